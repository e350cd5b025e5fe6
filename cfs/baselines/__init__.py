"""Methods against forgetting, one idea a file, and the table that names them.

To add one: a file with a subclass of `Method`, and its line in `METHODS` (docs/methods.md has an
example of about 20 lines). Its options become flags of `train.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfs.baselines.cfs import ContextFree
from cfs.baselines.cs import Contextual
from cfs.baselines.distill import Distill
from cfs.baselines.ewc import EWC
from cfs.baselines.flow import Flow
from cfs.baselines.freeze import Freeze
from cfs.baselines.ft import FineTuning, Pretraining
from cfs.baselines.hma import HMA
from cfs.baselines.l2 import L2, L2Init
from cfs.baselines.lora import Lora
from cfs.baselines.lota import Lota
from cfs.baselines.method import Method, Mix, Setting, Update
from cfs.baselines.mofo import Mofo
from cfs.baselines.replay import Replay
from cfs.baselines.sfa import SFA
from cfs.baselines.ssr import SSR
from cfs.baselines.task_arithmetic import TaskArithmetic
from cfs.baselines.wise_ft import WiseFT
from cfs.errors import UserError

__all__ = ["METHODS", "Method", "Mix", "Setting", "Update", "combined", "parsed"]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ContextFree,
        FineTuning,
        Contextual,
        Replay,
        Lora,
        WiseFT,
        L2,
        L2Init,
        EWC,
        Mofo,
        Lota,
        Flow,
        SFA,
        HMA,
        TaskArithmetic,
        SSR,
        Distill,
        Freeze,
        Pretraining,
    )
}


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
    return methods
