"""replay: raw text that theta* was pretrained on stands beside the task's examples.

    E_F[-log p_theta(y|x)] + lambda E_{x ~ D}[-log p_theta(x)],   D the pretraining data

(section 3, "P"; experience replay, Rolnick et al. 2019). The loss is on every token, as in
pretraining (eq. 1). Not data-oblivious: it needs `--replay-data`, of which the seed chooses as many
records as `--synthetic-ratio` asks for; the paper takes 400,000 rows of Dolma, as many as
MetaMathQA has. On TinyWorld the default is the embedded base's own pretraining text, another part
of it for each seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cfs.baselines.method import Method, Mix
from cfs.cli import option


@dataclass
class Replay(Method):
    """Nothing but the examples differs from plain fine-tuning; `train/mixing.py` brings them."""

    name = "replay"
    summary = "adds all-token loss on raw pretraining text (P)"
    source = "the paper, section 3; Rolnick et al. 2019"
    mix: ClassVar[Mix | None] = Mix("replay", "document")
    replay_data: str | None = option(None, "pretraining text; default: TinyWorld's")
    replay_format: str = option("text", "of --replay-data")
