"""cs: contextual synthetic data. Answers of theta* to the task's prompts stand beside the task's.

    E_F[-log p_theta(y|x)] + lambda E_{x ~ F, y' ~ p_theta*(.|x)}[-log p_theta(y'|x)]

(section 3, "CS", and section 2, "Conditional generation"). The answers are sampled at temperature
0.6 and top-p 0.95, one for each prompt in turn, `--synthetic-ratio` of them for each task example;
the loss is on the answer alone, as it is on the task's. The paper finds it to do poorly: it pulls
p(.|x) towards two answers at once, for the very same x, and says nothing of any other text.
"""

from __future__ import annotations

from typing import ClassVar

from cfs.baselines.method import Method, Mix


class Contextual(Method):
    """Nothing but the examples differs from plain fine-tuning; `train/mixing.py` brings them."""

    name = "cs"
    summary = "adds loss on the base's own answers to the task's prompts"
    source = "the paper, section 3"
    mix: ClassVar[Mix | None] = Mix("contextual", "answer", temperature=0.6, top_p=0.95)
