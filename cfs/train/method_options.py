"""The part of a training run's flags that belongs to its method, or follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from cfs.baselines import METHODS, Method, Mix, combined, parsed
from cfs.errors import UserError


def _method_fields() -> list[tuple[str, Any, Any]]:
    """Every option of every method, None by default: what its method says, where that takes part.

    A method's options stand in its own file, beside the formula that they are of.
    """
    found = []
    for method in METHODS.values():
        hints = get_type_hints(method)
        for its in method.options():
            shown = "" if its.default is None else f" [{its.default}]"
            meaning = its.metadata["help"] + shown
            facts = {"help": meaning, "metavar": its.metadata["metavar"], "group": method.name}
            found.append((its.name, hints[its.name] | None, field(default=None, metadata=facts)))
    return found


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class _Fields:
        """Read through `methods`, whose types are known, or by `method_option`."""
else:
    _Fields = make_dataclass("_Fields", _method_fields(), frozen=True)


@dataclass(frozen=True)
class MethodOptions(_Fields):
    """Every method's flags, and what the chosen ones say. `TrainConfig` adds the others."""

    if TYPE_CHECKING:
        method: str
        synthetic: str | None
        temperature: float | None
        top_p: float | None
        tuned: list[str] | None

    @property
    def methods(self) -> list[Method]:
        """The methods that take part, with their options, made anew: they may keep what they need.

        `--l2` alone adds the l2 penalty to any of them.
        """
        options = {
            its.name: getattr(self, its.name) for m in METHODS.values() for its in m.options()
        }
        is_added = bool(options["l2"]) and "l2" not in self.method.split("+")
        if not is_added:
            return combined(self.method, options)
        try:
            return combined(_joined(self.method, "l2"), options)
        except UserError as error:
            raise UserError(f"--l2 {options['l2']}: {error}; leave --l2 out") from error

    def method_option(self, name: str) -> Any:
        """A method's option by its name; None where it says nothing."""
        return getattr(self, name)

    @property
    def from_scratch(self) -> bool:
        """Does the run start from random weights?"""
        return any(method.from_scratch for method in parsed(self.method))

    @property
    def mixes(self) -> list[Mix]:
        """What stands beside the task's examples."""
        return [method.mix for method in parsed(self.method) if method.mix is not None]

    def check_method(self) -> None:
        """Raise `UserError` for flags that the method has no use for, or that contradict it."""
        self._check_options()
        sampled = [mix for mix in self.mixes if mix.temperature is not None]
        for name in ("synthetic", "temperature", "top_p"):
            if getattr(self, name) is not None and len(sampled) != 1:
                what = "mixes no samples in" if not sampled else "mixes several kinds of samples in"
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: --method {self.method} {what}; leave it out")
        if self.synthetic is not None and (self.temperature, self.top_p) != (None, None):
            raise UserError(
                "--synthetic: the corpus is drawn; --temperature and --top-p are its own"
            )
        if self.synthetic is not None and sampled[0].kind == "rehearsal":
            raise UserError(
                "--synthetic: ssr draws two corpora, instances and their answers, and keeps them "
                "in --corpora; leave it out"
            )
        needy = [method for method in self.methods if method.needs_tuned]
        needy = [method for method in needy if method.merges] or needy  # a merge takes them all
        if self.tuned is not None and not needy:
            raise UserError(f"--tuned: --method {self.method} needs no other model; leave it out")
        if self.tuned is not None and len(self.tuned) > 1 and not needy[0].takes_several:
            raise UserError(
                f"--tuned: {len(self.tuned)} models; {needy[0].name} takes one (task-arithmetic "
                "takes several)"
            )

    def _check_options(self) -> None:
        active = {method.name for method in self.methods}
        for other in METHODS.values():
            for its in other.options() if other.name not in active else []:
                value = getattr(self, its.name)
                if value is not None and not (its.name == "l2" and value == 0):
                    raise UserError(
                        f"--{its.name.replace('_', '-')} {value}: --method {self.method} has no "
                        f"{other.name}; leave the flag out{_or_joined(self.method, other.name)}"
                    )


def _joined(combination: str, name: str) -> str:
    """With one method more; plain fine-tuning is what every other one is added to."""
    return name if combination == "ft" else f"{combination}+{name}"


def _or_joined(combination: str, name: str) -> str:
    """What to say of joining the method, where the two go together."""
    joined = _joined(combination, name)
    try:
        parsed(joined)
    except UserError:
        return ""
    return f", or use --method {joined}"
