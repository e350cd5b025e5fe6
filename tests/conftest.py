"""Shared fixtures: one torch thread, real data where the checkout has it, tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfs.assets import TINYWORLD_DIR
from cfs.model import Decoder, build_model
from cfs.model.config import parse_config
from cfs.ranks import Ranks

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def stories260k() -> Path:
    """A real pretrained Llama of 260,032 parameters; skipped where the checkout lacks it."""
    path = SHARED_DATA / "stories260k"
    if not path.is_dir():
        pytest.skip("needs shared/data/stories260k beside the repository")
    return path


@pytest.fixture
def tinyworld() -> Path:
    return TINYWORLD_DIR


def tiny_config(family: str = "olmo", **changes: object) -> dict[str, object]:
    """The content of a config.json of a model that runs in a millisecond."""
    config: dict[str, object] = {
        "architectures": ["OlmoForCausalLM" if family == "olmo" else "LlamaForCausalLM"],
        "model_type": family,
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    return config | changes


def tiny_model(family: str = "olmo", seed: int = 0, **changes: object) -> Decoder:
    """A random model whose logits are of ordinary scale, so that its text has some order."""
    model = build_model(parse_config(tiny_config(family, **changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_table = name.startswith(("embed_tokens", "lm_head"))
            std = 0.3 if is_table else 1 / parameter.shape[-1] ** 0.5
            mean = 1.0 if parameter.ndim == 1 else 0.0
            parameter.normal_(mean, std, generator=generator)
    return model


def run_python(*arguments: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script or module of the repository, under torchrun for more than one rank."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
