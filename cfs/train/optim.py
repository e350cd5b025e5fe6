"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from cfs.model import Decoder

EMBEDDING_STD = 0.02


def cosine_lr(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then cosine to zero.

    warmup  share of `num_steps` (section 3: 3 %); the last warm-up step is the peak
    """
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_adamw(
    model: nn.Module, lr: float, weight_decay: float, beta2: float = 0.999
) -> torch.optim.AdamW:
    """AdamW over the parameters, or their shards; gains of norms do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    param_groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    param_groups = [group for group in param_groups if group["params"]]
    return torch.optim.AdamW(param_groups, lr=lr, betas=(0.9, beta2), fused=True)


def init_weights(model: Decoder, seed: int) -> None:
    """Random weights for pretraining: normal, gains at one.

    Projections have deviation sqrt(2 / 5D) (arXiv 1910.05895), those into the residual stream
    less by sqrt(2 * layers), so that its variance does not grow with depth; embeddings 0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    projection_std = math.sqrt(2 / (5 * model.config.hidden_size))
    residual_std = projection_std / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.ones_(parameter)
        elif name.startswith(("embed_tokens", "lm_head")):
            nn.init.normal_(parameter, std=EMBEDDING_STD, generator=generator)
        else:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = residual_std if into_residual else projection_std
            nn.init.normal_(parameter, std=std, generator=generator)
