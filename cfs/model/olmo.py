"""The first OLMo family (OLMo-1B, OLMo-7B): non-parametric LayerNorm, optional `clip_qkv`.

No tensor belongs to a norm and no bias exists anywhere. OLMo 2 and later are other families.
The rest is `decoder.py`; the clipping of queries, keys and values is in `layers.Attention`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cfs.model.config import ModelConfig
from cfs.model.decoder import Decoder


class LayerNorm(nn.Module):
    """(x - mean) / std without gain or bias, in float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) any float dtype -> (..., D) same dtype."""
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Olmo(Decoder):
    """OLMo; see `Decoder` for the interface."""

    norm_class = LayerNorm
