"""Plain fine-tuning, and pretraining: the two runs that no method against forgetting is part of."""

from __future__ import annotations

from typing import ClassVar

from cfs.baselines.method import Method


class FineTuning(Method):
    """min E_F[-log p(y|x)] starting from theta* (section 2, "standard fine-tuning")."""

    name = "ft"
    summary = "loss on the task's responses alone: standard supervised fine-tuning"
    source = "the paper, section 2"
    alone: ClassVar[str | None] = "every other method is plain fine-tuning and something more"


class Pretraining(Method):
    """min E_D[-log p(x)] from random weights (eq. 1)."""

    name = "pretrain"
    summary = "loss on every token, from random weights"
    source = "the paper, eq. 1"
    alone: ClassVar[str | None] = "it starts from random weights, which nothing is to be kept of"
    all_tokens = True
    from_scratch = True
