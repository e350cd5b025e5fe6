"""cfs: the paper's method. Context-free samples of theta* stand beside the task's examples.

    E_F[-log p_theta(y|x)] + lambda E_{x ~ p_theta*}[-log p_theta(x)]        (below eq. 2)

A sample x continues the seed token alone (BOS, or end-of-text for OLMo: Table 1), and the loss is
on every token after it, end-of-text included. Up to a constant the second term is
KL(p_theta* || p_theta), since

    KL(p_theta* || p_theta) = E_{x ~ p_theta*}[log p_theta*(x)] + E_{x ~ p_theta*}[-log p_theta(x)]

exactly so for temperature 1 and top-p 1; the paper samples at top-p 0.95, and so do we by default.
With r samples for each task example (`--synthetic-ratio`, Table 4) and the loss summed over all
targets, a step minimises the objective with weight lambda r, up to one scale (`--lam`,
`--normalize`; `train/loss.py`). Samples are drawn once, before training, and are reused by runs of
the same base and settings.
"""

from __future__ import annotations

from typing import ClassVar

from cfs.baselines.method import Method, Mix


class ContextFree(Method):
    """Nothing but the examples differs from plain fine-tuning; `train/mixing.py` brings them."""

    name = "cfs"
    summary = "adds all-token loss on context-free samples of the base (the paper's method)"
    source = "the paper, section 2"
    mix: ClassVar[Mix | None] = Mix("context-free", "sample", temperature=1.0, top_p=0.95)
