"""What a sequence of fine-tunings left: the accuracy of each stage's skill after every stage.

Throughout, T is the number of stages and `scores` is (T + 1, T), shares in [0, 1]: row i is the
model after stage i (row 0 before any), column j the skill of stage j + 1. The sources number tasks
from 1 and have no row 0; their R_{i,j} and a_{i,j} are `scores[i, j - 1]`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

import cfs.eval.report  # noqa: F401 (sets how figures look)
from cfs.files import blaming, write_atomically, writing_file

DARKEST = 1.8
"""Share that would be black: at 1 a cell is a grey on which its number still reads, in black."""
NOTE = (
    "Accuracy in percent, differences in points. KL(theta* || theta) per sequence compares the "
    "models before and after the stage."
)


def average_accuracy(scores: np.ndarray) -> float:
    """ACC, the mean accuracy over all skills after the last stage; in [0, 1].

    Source: Lopez-Paz and Ranzato 2017 (arXiv:1706.08840), ACC = 1/T sum_j R_{T,j}.
    """
    return float(scores[-1].mean())


def backward_transfer(scores: np.ndarray) -> float | None:
    """BWT, what later stages added to the skills learned before; in [-1, 1], below 0 for a loss.

    None for one stage, which has no later one.
    Source: Lopez-Paz and Ranzato 2017 (arXiv:1706.08840),
    BWT = 1/(T-1) sum_{j<T} (R_{T,j} - R_{j,j}).
    """
    if scores.shape[1] == 1:
        return None
    learned = np.diagonal(scores[1:])
    return float((scores[-1] - learned)[:-1].mean())


def forgetting_matrix(scores: np.ndarray) -> np.ndarray:
    """(T, T) float64: how far below its best each skill is after stage k, row k - 1; in [-1, 1].

    NaN but where skill j was learned before stage k. The best is over earlier stages, without
    stage k and row 0, so that a skill better than ever has been forgotten less than nothing.
    Source: Chaudhry et al. 2018 (arXiv:1801.10112), section 3,
    f_j^k = max_{l in 1..k-1} a_{l,j} - a_{k,j} for j < k.
    """
    after = scores[1:].astype(np.float64)
    forgotten = np.full(after.shape, np.nan)
    for row in range(1, len(after)):
        best = after[:row, :row].max(axis=0)
        forgotten[row, :row] = best - after[row, :row]
    return forgotten


def forgetting(scores: np.ndarray) -> float | None:
    """F, the mean over skills of what is forgotten after the last stage; None for one stage.

    Source: Chaudhry et al. 2018 (arXiv:1801.10112), section 3, F_k = 1/(k-1) sum_{j<k} f_j^k
    at k = T.
    """
    if scores.shape[1] == 1:
        return None
    return float(forgetting_matrix(scores)[-1, :-1].mean())


def stage_table(
    names: list[str], scores: np.ndarray, old_means: np.ndarray, kls: list[float | None]
) -> list[list[str]]:
    """Cells of the table, its head first: a row for each stage, then what was forgotten of each
    skill after the last one."""
    rows = [["after stage", *names, "mean of old", "KL (nats)"]]
    labels = _labels(names)
    for label, row, old, kl in zip(labels, scores, old_means, [None, *kls], strict=True):
        rows.append([label, *map(_percent, row), _percent(old), "" if kl is None else f"{kl:.2f}"])
    if len(names) > 1:
        rows.append(["forgotten", *map(_percent, forgetting_matrix(scores)[-1]), "", ""])
    return rows


def plot_stages(names: list[str], scores: np.ndarray, old_means: np.ndarray, file: Path) -> None:
    """A heat map in greys with its numbers, the skill that each stage taught in a frame."""
    width = 1.6 + 1.1 * (len(names) + 1)
    figure = Figure(figsize=(width, 1.3 + 0.45 * len(scores)), layout="constrained")
    skills, old = figure.subplots(1, 2, width_ratios=(len(names), 1))
    _draw_cells(skills, scores, names)
    _draw_cells(old, old_means[:, None], ["mean of\nold skills"])
    skills.set_yticks(range(len(scores)), _labels(names))
    skills.set(xlabel="accuracy (%); framed: what the stage taught", ylabel="after stage")
    old.set_yticks([])
    for j in range(len(names)):
        place = (j - 0.47, j + 1 - 0.47)
        skills.add_patch(Rectangle(place, 0.94, 0.94, fill=False, ec="black", lw=2))
    with writing_file(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw_cells(axes: Axes, shares: np.ndarray, columns: list[str]) -> None:
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=DARKEST, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        axes.text(j, i, _percent(share), ha="center", va="center")
    axes.set_xticks(range(len(columns)), [c.replace("_", "\n", 1) for c in columns])
    axes.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(shares)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)


def write_stages(
    out: Path,
    names: list[str],
    scores: np.ndarray,
    old_means: np.ndarray,
    kls: list[float | None],
    console: Console | None = None,
) -> None:
    """Write stages.json, stages.md and stages.svg; print the table.

    names      (T,) the skill of each stage, each another one
    scores     (T + 1, T) float, accuracy in [0, 1]; see the head of this file
    old_means  (T + 1,) float, mean accuracy of the old skills; NaN where none was scored
    kls        (T,) KL(theta* || theta) of each stage in nats per sequence; None where not measured
    """
    assert scores.shape == (len(names) + 1, len(names)), (scores.shape, names)
    assert old_means.shape == (len(scores),), f"{old_means.shape}: a mean for each row of scores"
    assert len(kls) == len(names), f"{len(kls)} KLs of {len(names)} stages"
    assert ((scores >= 0) & (scores <= 1)).all(), "scores are shares, not percent"
    rows, measures = stage_table(names, scores, old_means, kls), _measures(scores)
    table = Table(*rows[0], title="Accuracy (%) after each stage", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    console = console or Console()
    console.print(table)
    console.print(f"{measures}\n{NOTE}", highlight=False, soft_wrap=True)
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]]
    content = {
        "stages": names,
        "scores": scores.tolist(),
        "old_means": _without_nan(old_means),
        "kl_nats": kls,
        "acc": average_accuracy(scores),
        "bwt": backward_transfer(scores),
        "forgetting": forgetting(scores),
        "forgetting_matrix": [_without_nan(row) for row in forgetting_matrix(scores)],
    }
    with blaming(out, "free some space, and run the same command again"):
        write_atomically(out / "stages.md", "\n".join([*lines, "", measures, "", NOTE, ""]))
        plot_stages(names, scores, old_means, out / "stages.svg")
        write_atomically(out / "stages.json", json.dumps(content, indent=2) + "\n")
    console.print(f"{out}: stages.json, stages.md, stages.svg", highlight=False, soft_wrap=True)


def _measures(scores: np.ndarray) -> str:
    """ACC, and from two stages on BWT and F, in a line."""
    parts = [f"average accuracy (ACC) {_percent(average_accuracy(scores))} %"]
    if (transfer := backward_transfer(scores)) is not None:
        parts.append(f"backward transfer (BWT) {100 * transfer:+.1f} points")
    if (forgotten := forgetting(scores)) is not None:
        parts.append(f"forgetting (F) {_percent(forgotten)} points")
    return ", ".join(parts)


def _labels(names: list[str]) -> list[str]:
    return ["0 (base)", *(f"{i} {name}" for i, name in enumerate(names, 1))]


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f}"


def _without_nan(shares: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if math.isnan(share) else float(share) for share in shares]
