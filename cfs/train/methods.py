"""The one table of methods. A method says which data a run meets and where it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A training method, as the places in which it differs from plain fine-tuning."""

    name: str
    summary: str
    uses_synthetic: bool = False
    """Mix in context-free samples of the starting model, every token a target."""
    all_tokens: bool = False
    """Every token of a task example is a target, as in pretraining (eq. 1)."""
    from_scratch: bool = False
    """Start from random weights instead of the checkpoint's."""


METHODS = {
    method.name: method
    for method in (
        Method(
            "cfs",
            "masked task loss + all-token loss on context-free samples of the base (eq. 2)",
            uses_synthetic=True,
        ),
        Method("ft", "masked task loss alone: standard supervised fine-tuning"),
        Method(
            "pretrain",
            "all-token loss from random weights (eq. 1)",
            all_tokens=True,
            from_scratch=True,
        ),
    )
}
