"""Methods against forgetting, one idea a file, and the table that names them.

To add one: a file with a subclass of `Method`, and its line in `TABLE` (docs/methods.md has an
example of about 20 lines). Its options become flags of `train.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from cfs.baselines.method import Method, Mix, Setting, Update
from cfs.errors import UserError

__all__ = ["METHODS", "Method", "Mix", "Setting", "Update", "combined", "parsed"]

TABLE = (
    "cfs:ContextFree",
    "ft:FineTuning",
    "cs:Contextual",
    "replay:Replay",
    "lora:Lora",
    "wise_ft:WiseFT",
    "l2:L2",
    "l2:L2Init",
    "ewc:EWC",
    "mofo:Mofo",
    "lota:Lota",
    "flow:Flow",
    "sfa:SFA",
    "hma:HMA",
    "task_arithmetic:TaskArithmetic",
    "ssr:SSR",
    "distill:Distill",
    "freeze:Freeze",
    "ft:Pretraining",
)
"""file:class of every method, in the order in which they are listed."""


def _imported(place: str) -> type[Method]:
    file, name = place.split(":")
    return getattr(import_module(f"cfs.baselines.{file}"), name)


METHODS: dict[str, type[Method]] = {method.name: method for method in map(_imported, TABLE)}


def parsed(combination: str) -> list[type[Method]]:
    """The methods that a `--method` such as "l2+cfs" names.

    Raises `UserError` for an unknown one, and for two that do not go together, with the reason.
    """
    names = combination.split("+")
    for name in names:
        if name not in METHODS:
            raise UserError(
                f"--method {combination!r}: {name!r} is unknown; known: {', '.join(METHODS)}, and "
                "combinations with '+' such as l2+cfs"
            )
        if names.count(name) > 1:
            raise UserError(f"--method {combination}: names {name} twice")
    found = [METHODS[name] for name in names]
    for method in found if len(found) > 1 else []:
        if method.alone is not None:
            raise UserError(f"--method {combination}: {method.name} goes alone ({method.alone})")
    pairs = [(one, other) for i, one in enumerate(found) for other in found[i + 1 :]]
    for one, other in pairs:
        if reason := one.excludes.get(other.name) or other.excludes.get(one.name):
            raise UserError(f"--method {combination}: {one.name} and {other.name} ({reason})")
        for place in one.claims.keys() & other.claims.keys():
            raise UserError(
                f"--method {combination}: both decide {place}: {one.name} "
                f"{one.claims[place]}, {other.name} {other.claims[place]}"
            )
    return found


def combined(combination: str, options: Mapping[str, Any]) -> list[Method]:
    """The methods with their options, None standing for a method's own default; checked."""
    methods = []
    for method_class in parsed(combination):
        names = [field.name for field in method_class.options()]
        given = {name: options[name] for name in names if options.get(name) is not None}
        method = method_class(**given)
        method.check()
        methods.append(method)
    # What chooses among the entries of a gradient comes after the penalties that add to it.
    return sorted(methods, key=lambda method: "the update" in method.claims)
