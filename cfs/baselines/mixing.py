"""The methods that differ from fine-tuning by what stands beside the task's examples.

All of them minimise, with lambda = `--lam` and r = `--synthetic-ratio` (section 3, "1:1 mix"),

    E_F[-log p(y|x)] + lambda r E_S[loss on the examples of the source S]

They differ in S, and in whether the loss there is on every token or on a response:

    cfs      x ~ p_theta*                            every token
    cs       y ~ p_theta*(y|x), x a task's prompt    the response
    replay   x from the pretraining data             every token

The fourth, `ssr`, has a file of its own. For cfs alone the second term is KL(p_theta* || p_theta)
up to a constant, because its samples are of p_theta* itself and nothing is given before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfs.baselines.method import Method, Mix
from cfs.cli import option


class ContextFree(Method):
    """x sampled from theta* prompted with its seed token alone (eq. 2 and below; Table 1)."""

    name = "cfs"
    summary = "adds all-token loss on context-free samples of the base (the paper's method)"
    source = "the paper, section 2"
    mix: ClassVar[Mix | None] = Mix("context-free", "sample", temperature=1.0, top_p=0.95)


class Contextual(Method):
    """(x, y) with y sampled by theta* after the task's own prompts x (section 3, "CS").

    It pulls p(y|x) of the very same x towards two answers at once: the task's and theta*'s.
    """

    name = "cs"
    summary = "adds loss on the base's own answers to the task's prompts"
    source = "the paper, section 3"
    mix: ClassVar[Mix | None] = Mix("contextual", "answer", temperature=0.6, top_p=0.95)


@dataclass
class Replay(Method):
    """x from the data that theta* was trained on (section 3, "P"; Rolnick et al. 2019).

    Not data-oblivious: it needs `--replay-data`. On TinyWorld that is the base's own pretraining
    text, a different part of it for each seed.
    """

    name = "replay"
    summary = "adds all-token loss on raw pretraining text (P)"
    source = "the paper, section 3; Rolnick et al. 2019"
    mix: ClassVar[Mix | None] = Mix("replay", "document")
    replay_data: str | None = option(None, "pretraining text; default: TinyWorld's")
    replay_format: str = option("text", "of --replay-data")
