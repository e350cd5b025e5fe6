"""Random models of the shapes that the benches measure, and the table they print.

Their input table has a direction of its own and the head's row of end-of-text is laid along it, so
that a text ends at each token with a chance of about 0.7 % (a mean length of 116 within 256
tokens); all other logits have a standard deviation of 2.7.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

from cfs.model import Decoder, build_model
from cfs.model.config import parse_config

HAZARD, EOS = 0.0072, 0
SHAPES: dict[str, dict[str, Any]] = {
    "warm-up": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "olmo-50304": {
        "architectures": ["OlmoForCausalLM"],
        "model_type": "olmo",
        "vocab_size": 50304,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "llama-128256": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    "llama-125m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "olmo-1b": {
        "architectures": ["OlmoForCausalLM"],
        "model_type": "olmo",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
}


def config_of(shape: str) -> dict[str, Any]:
    """The content of the model's config.json."""
    return {
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "torch_dtype": "float32",
    } | SHAPES[shape]


@torch.inference_mode()
def random_model(
    shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", hazard: float = HAZARD
) -> Decoder:
    """A model whose texts end by end-of-text with about `hazard` at each token."""
    config = parse_config(config_of(shape))
    generator = torch.Generator(device).manual_seed(0)
    model = build_model(config, device="meta").to(dtype).to_empty(device=device)
    width = config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            std = 2.7 / width**0.5 if name.startswith("lm_head") else 0.02
            parameter.normal_(0.0, std, generator=generator)
    direction = torch.randn(width, generator=generator, device=device, dtype=torch.float32)
    direction = (direction - direction.mean()) / direction.std()
    model.embed_tokens.weight += (0.5 * direction).to(dtype)
    texts = torch.randint(1, config.vocab_size, (8, 64), generator=generator, device=device)
    logits = model(texts).flatten(0, 1).float()
    # The row of end-of-text is scale * direction: find the scale at which its chance is the hazard.
    probe = direction / width
    model.lm_head.weight[EOS] = probe.to(dtype)  # type: ignore[union-attr]
    along = model(texts)[..., EOS].flatten().float()
    others = logits[:, 1:].logsumexp(-1)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        chance = (along * middle - others).sigmoid().mean().item()
        low, high = (middle, high) if chance < hazard else (low, middle)
    model.lm_head.weight[EOS] = (low * probe).to(dtype)  # type: ignore[union-attr]
    return model.eval()


def columns(title: str, names: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table
