"""The parts of a block that the families share: rotary embedding, attention, gated MLP.

Module names follow the Hugging Face tensor names, so loading needs no table of renamings.

Shapes: B rows, T positions, D model width, H heads, K KV heads, C channels per head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfs.model.attention import AttentionContext
from cfs.model.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each channel pair, (C/2,) float32 on the CPU.

    Without scaling: theta^(-2i/C). The llama3 rule divides the frequencies whose wavelength
    exceeds the low-frequency bound by `factor`, keeps those below the high-frequency bound, and
    blends linearly in between (Llama 3.1; arXiv 2407.21783).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


class Rope:
    """Rotary phases, in float32 whatever the model's dtype: bfloat16 cannot count past 256.

    Not a buffer: `to_empty` and mixed-precision casts would destroy or round it.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.frequencies = rope_frequencies(config)

    def phases(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) or (B, T) int64 -> cos and sin, (1 or B, 1, T, C/2) float32."""
        if self.frequencies.device != position_ids.device:
            self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids[..., None].float() * self.frequencies
        angles = angles.view(-1, 1, *angles.shape[-2:])
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pair (i, i + C/2) by its phase; x (B, H, T, C), same dtype back."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention; OLMo may clip q, k and v before the rotation."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.clip_qkv = config.clip_qkv
        q_width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.clip_qkv is not None:
            q, k, v = (y.clamp(-self.clip_qkv, self.clip_qkv) for y in (q, k, v))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        mixed = context.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; keeps its two arguments alone for the backward pass.

    They are the widest tensors of a block, and autograd by itself would keep silu(gate) too.
    """
    is_recorded = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    return _SwiGLU.apply(gate, up) if is_recorded else F.silu(gate) * up  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)
