"""The Llama family: RMSNorm with a learned gain, grouped-query attention, optional llama3 RoPE.

Covers Llama 1 to 3.x and models distilled into them, such as DeepSeek-R1-Distill-Llama-8B.
The rest is `decoder.py`; what grouped queries and the llama3 frequencies do is in `layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cfs.model.config import ModelConfig
from cfs.model.decoder import Decoder


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistic in float32 and the product in x's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) any float dtype -> (..., D) same dtype."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Llama(Decoder):
    """Llama; see `Decoder` for the interface."""

    norm_class = RMSNorm
