"""The figures of a study: old skills against the new one, and against the KL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from cfs.eval.report import COLOURS
from cfs.eval.studies import Study
from cfs.eval.study_results import Line, Result, spearman
from cfs.files import writing_file

PARETO, KL = "pareto", "kl"
PARETO_LEGEND = (
    "Up and to the right is better. Markers: methods at the setting marked * in the table, with "
    "95 % intervals;\ndots: their other settings; dashed line: methods that no other beats in both."
)
MARKERS = "osD^vP<>phd"
BASE = {"marker": "*", "color": "black", "markersize": 13}
BASELINE = {"marker": "X", "color": "black", "markersize": 10}
LABEL_RADII = (9, 14, 20, 28, 38, 50, 64)
"""Points from a marker at which a place for its label is tried, nearest first."""
Style = dict[str, Any]
XY = tuple[float, float]


@dataclass(frozen=True)
class Head:
    """A point to be labelled, in percent, with the half-widths of its error bars."""

    name: str
    xy: XY
    colour: str
    half_widths: XY = (0.0, 0.0)


def plot_pareto(study: Study, base: Result, lines: list[Line]) -> Figure:
    """Accuracy of old skills over that of the new one, in percent.

    A marker with 95 % intervals for each method's headline setting, a thin line through its other
    settings (small dots), and dashed the methods that no other beats in both.
    """
    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.subplots()
    heads: list[Head] = []
    for label, (style, settings) in _by_method(study, lines).items():
        points = [xy for line in settings if (xy := _xy(line)) is not None]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=style["color"], linewidth=0.7, alpha=0.55, zorder=1)
            axes.plot(x, y, ".", color=style["color"], markersize=4, alpha=0.55, zorder=1)
        for line in settings:
            if line.is_headline and (head := _xy(line)) is not None:
                x, y = head
                xerr, yerr = (_half_width(line, q) for q in ("new_skill", "old_skills"))
                look = _marked(style) | {"elinewidth": 0.8, "zorder": 3}
                axes.errorbar(x, y, xerr=xerr, yerr=yerr, **look)
                heads.append(Head(label, head, style["color"], (xerr or 0.0, yerr or 0.0)))
    if len(front := _front([head.xy for head in heads])) > 1:
        axes.plot(*zip(*front, strict=True), "--", color="0.6", linewidth=0.9, zorder=0)
    axes.margins(0.06)
    if base.new_skill is not None and base.old_skills is not None:
        heads.insert(0, _draw_base(axes, 100 * base.new_skill, 100 * base.old_skills))
    for low_high, bound in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        bound(max(-4.0, low_high[0]), min(104.0, low_high[1]))  # intervals may leave the percents
    axes.set(xlabel="new skill, accuracy (%)", ylabel="old skills, mean accuracy (%)")
    _title(axes, study.title, PARETO_LEGEND)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, linewidth=0.5)
    _label(figure, axes, heads)
    return figure


def plot_kl(study: Study, lines: list[Line]) -> Figure:
    """Mean accuracy of old skills over the KL, a marker for each setting and seed."""
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    everything: list[XY] = []
    for label, (style, settings) in _by_method(study, lines).items():
        points = [
            (result.kl_nats, 100 * result.old_skills)
            for line in settings
            for result in line.results
            if result.kl_nats is not None and result.old_skills is not None
        ]
        everything += points
        drawn = [point for point in points if point[0] > 0]
        if drawn:
            look = {**_marked(style), "markersize": 0.75 * style["markersize"]}
            look["zorder"] = 3 if label == study.baseline else 2  # few points, easily hidden
            axes.plot(*zip(*drawn, strict=True), label=label, linestyle="none", **look)
    about = f"{len(everything)} results, one a setting and seed"
    if everything:
        correlation = spearman(*map(list, zip(*everything, strict=True)))
        about += "" if correlation is None else f"; Spearman's rank correlation {correlation:.3f}"
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if hidden := sum(kl <= 0 for kl, _ in everything):
        about += f"; {hidden} with an estimate of 0 or less not drawn"
    _title(axes, study.title, about)
    axes.set(xlabel="KL(base || model), nats per sequence", ylabel="old skills, mean accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, linewidth=0.5)
    return figure


def _title(axes: Axes, title: str, about: str) -> None:
    """A title, and under it in small some lines about the picture."""
    axes.set_title(title, loc="left", pad=9 + 11 * len(about.splitlines()))
    at: Style = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(about, (0, 1), (0, 6), **at, fontsize=8).set_in_layout(False)


def save(figure: Figure, out: Path, name: str) -> None:
    """As `name`.svg and, for viewers that know no better, `name`.png."""
    with writing_file(out / f"{name}.svg") as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    with writing_file(out / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _draw_base(axes: Axes, new: float, old: float) -> Head:
    """A star; where it lies far to the left of all methods, at the edge, its place in words."""
    left, right = axes.get_xlim()
    is_far = bool(axes.lines) and new < left - 0.25 * (right - left)
    name = f"base (new skill {new:.0f} %)" if is_far else "base"
    at = (left if is_far else new, old)
    axes.axhline(old, color="0.6", linewidth=0.7, linestyle=":", zorder=0)
    axes.plot(*at, **BASE, linestyle="none", zorder=4, clip_on=False)
    if is_far:
        axes.set_xlim(left, right)
    return Head(name, at, "black")


def _by_method(study: Study, lines: list[Line]) -> dict[str, tuple[Style, list[Line]]]:
    """Each method's look, the same in both figures whatever is finished, and its settings."""
    table: dict[str, tuple[Style, list[Line]]] = {}
    rows = [row for row in study.rows if row.label != study.baseline]
    styles: dict[str, Style] = {study.baseline: BASELINE}
    for number, row in enumerate(rows):
        colour = COLOURS[1:][number % (len(COLOURS) - 1)]
        styles[row.label] = {
            "marker": MARKERS[number % len(MARKERS)],
            "color": colour,
            "markersize": 7,
            "markerfacecolor": "white" if number // len(MARKERS) % 2 else colour,
        }
    for line in lines:
        table.setdefault(line.row.label, (styles[line.row.label], []))[1].append(line)
    return table


def _marked(style: Style) -> Style:
    is_hollow = style.get("markerfacecolor") == "white"
    edge = (style["color"], 1.3) if is_hollow else ("white", 0.6)
    return {**style, "markeredgecolor": edge[0], "markeredgewidth": edge[1]}


def _xy(line: Line) -> XY | None:
    """New and old skills in percent, if both are known."""
    new, old = line.mean("new_skill"), line.mean("old_skills")
    return None if new is None or old is None else (100 * new, 100 * old)


def _half_width(line: Line, quantity: str) -> float | None:
    estimate = line.estimate(quantity)
    half_width = None if estimate is None else estimate.half_width
    return None if half_width is None else 100 * half_width


def _front(points: list[XY]) -> list[XY]:
    """Those that no other point reaches in both coordinates, from left to right."""
    front: list[XY] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


# ------------------------------------------------------------------------------------- labels


def _label(figure: Figure, axes: Axes, heads: list[Head]) -> None:
    """Write each name near its point, where it covers no marker, no bar and no other name.

    Places around the point are tried from the nearest outwards; the first that is free is taken,
    or else the one that covers least. A hair line leads to those further away.
    """
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # the layout must stand before pixels mean anything
    figure.set_layout_engine("none")
    pixels_per_point = figure.dpi / 72
    taken = [box for head in heads for box in _drawn_boxes(axes, head)]
    for head in heads:
        text = axes.annotate(
            head.name, head.xy, (0, 0), textcoords="offset points", fontsize=8, color=head.colour
        )
        text.set(zorder=5, bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3})
        centre = axes.transData.transform(head.xy)
        extent = text.get_window_extent(canvas.get_renderer())
        radius, box = _best_place(axes, centre, extent, taken)
        taken.append(box.padded(1))
        text.set_position(tuple((np.array([box.x0, box.y0]) - centre) / pixels_per_point))
        if radius > LABEL_RADII[0]:
            ends = axes.transData.inverted().transform([np.clip(centre, box.min, box.max), centre])
            axes.plot(
                *ends.T, color=head.colour, linewidth=0.6, zorder=2, scalex=False, scaley=False
            )


def _drawn_boxes(axes: Axes, head: Head) -> list[Bbox]:
    """What a marker and its error bars cover, in pixels."""
    corners = np.array([head.xy, head.xy]) + np.array([[-1], [1]]) * head.half_widths
    (x0, y0), (x1, y1) = axes.transData.transform(corners)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    marker = Bbox.from_extents(x - 6, y - 6, x + 6, y + 6)
    return [
        marker,
        Bbox.from_extents(x0, y - 1, x1, y + 1),
        Bbox.from_extents(x - 1, y0, x + 1, y1),
    ]


def _best_place(
    axes: Axes, centre: np.ndarray, extent: Bbox, taken: list[Bbox]
) -> tuple[float, Bbox]:
    """The nearest place that covers nothing, or the one that covers least, and how far it is."""
    best: tuple[float, float, Bbox] | None = None
    for radius in LABEL_RADII:
        for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
            box = _placed(centre, extent, radius * axes.figure.dpi / 72, angle)
            covered = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, axes.bbox)
            cost = covered + 10 * outside
            if best is None or cost < best[0]:
                best = (cost, radius, box)
        if best is not None and best[0] < 1e-6:
            break
    assert best is not None, "there are places to try"
    return best[1], best[2]


def _placed(centre: np.ndarray, extent: Bbox, radius: float, angle: float) -> Bbox:
    """A box of the text's size beside `centre`, its nearest side `radius` away in a direction."""
    direction = np.array([np.cos(angle), np.sin(angle)])
    size = np.array([extent.width, extent.height])
    middle = centre + direction * radius + np.sign(direction.round(6)) * size / 2 * abs(direction)
    return Bbox.from_bounds(*(middle - size / 2), *size)


def _overlap(box: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(box, other)
    return 0.0 if shared is None else shared.width * shared.height
