"""A merged checkpoint is the function of its parts, and costs no more than a parameter of each."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfs.errors import UserError
from cfs.model import load_model, save_model
from cfs.model.merging import merge_checkpoints
from tests.conftest import REPOSITORY, tiny_model

COMPANIONS = ("tokenizer.json", "tokenizer_config.json")


def checkpoint(path: Path, seed: int = 0, dtype: torch.dtype | None = None, **changes: Any) -> Path:
    save_model(tiny_model("llama", seed, **changes), path, dtype)
    return path


def first(_name: str, original: Tensor, _tuned: list[Tensor]) -> Tensor:
    return original


def difference(_name: str, original: Tensor, tuned: list[Tensor]) -> Tensor:
    return tuned[0] - tuned[1] + 2 * original


def test_every_parameter_is_the_function_of_the_same_one(tmp_path: Path) -> None:
    """Catches models that change places, and a parameter merged with another one's values."""
    base, one, two = (checkpoint(tmp_path / str(seed), seed) for seed in range(3))
    merge_checkpoints(base, [one, two], tmp_path / "out", difference)
    names = []
    models = [dict(load_model(path).named_parameters()) for path in (base, one, two)]
    for name, value in load_model(tmp_path / "out").named_parameters():
        original, *tuned = (model[name].detach() for model in models)
        assert torch.equal(value, difference(name, original, tuned))
        names.append(name)
    assert names == list(models[0])


def test_the_function_is_told_our_names_in_order(tmp_path: Path) -> None:
    """Catches a method that treats a parameter by its name and is told another."""
    base, told = checkpoint(tmp_path / "base"), []

    def note(name: str, original: Tensor, _tuned: list[Tensor]) -> Tensor:
        told.append((name, original.shape))
        return original

    merge_checkpoints(base, [], tmp_path / "out", note)
    assert told == [(name, p.shape) for name, p in load_model(base).named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """Catches arithmetic in bfloat16, and a result twice as large as its base."""
    base = checkpoint(tmp_path / "base", dtype=dtype)
    tuned = checkpoint(tmp_path / "tuned", 1, dtype=torch.float32)
    wide = torch.promote_types(dtype, torch.float32)

    def halfway(_name: str, original: Tensor, tuned: list[Tensor]) -> Tensor:
        assert {original.dtype, tuned[0].dtype} == {wide}
        return (original + tuned[0]) / 2

    merge_checkpoints(base, [tuned], tmp_path / "out", halfway)
    merged = load_model(tmp_path / "out")
    parts = zip(load_model(base).parameters(), load_model(tuned).parameters(), strict=True)
    for value, (original, other) in zip(merged.parameters(), parts, strict=True):
        assert torch.equal(value, ((original.to(wide) + other.to(wide)) / 2).to(dtype))
    merge_checkpoints(base, [tuned], tmp_path / "same", first)
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()


def test_a_tied_head_is_merged_once(tmp_path: Path) -> None:
    """Catches a head that is merged apart from the embedding it is, or written beside it."""
    base, tuned = (
        checkpoint(tmp_path / str(seed), seed, tie_word_embeddings=True) for seed in range(2)
    )
    file = tuned / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    merge_checkpoints(base, [tuned], tmp_path / "out", lambda _, original, tuned: tuned[0])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in written
    del tensors["lm_head.weight"]
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in written)


def test_config_and_tokenizer_come_from_the_base(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a result with the tokenizer, or without the special tokens, of another model."""
    shutil.copytree(tinyworld, tmp_path / "tuned")
    for name in COMPANIONS:
        (tmp_path / "tuned" / name).write_text("{}")
    merge_checkpoints(tinyworld, [tmp_path / "tuned"], tmp_path / "out", first)
    for name in ("config.json", *COMPANIONS):
        assert (tmp_path / "out" / name).read_bytes() == (tinyworld / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, "hidden_size=64; expected 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3; expected 2"),
        ({"vocab_size": 98}, "vocab_size=98; expected 97"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2; expected 4"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True; expected False"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps=0.001; expected 1e-06"),
        ({"rope_theta": 5e5}, "rope_theta=500000.0; expected 10000.0"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, "num_attention_h"),
    ],
)
def test_another_architecture_is_refused(changes: dict, said: str, tmp_path: Path) -> None:
    """Catches an average of weights that mean different things, of the same shapes or not."""
    base, tuned = checkpoint(tmp_path / "base"), checkpoint(tmp_path / "tuned")
    other = checkpoint(tmp_path / "other", **changes)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("old")
    with pytest.raises(UserError) as caught:
        merge_checkpoints(base, [tuned, other], tmp_path / "out", first)
    message = str(caught.value)
    assert message.startswith(f"{other}: config.json gives ")
    assert said in message
    assert f"as in {base}; give a model" in message
    assert "\n" not in message
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["kept.txt"]


def test_another_family_is_refused(tmp_path: Path) -> None:
    """Catches an OLMo and a Llama merged because their matrices fit."""
    base = checkpoint(tmp_path / "base")
    save_model(tiny_model("olmo"), tmp_path / "olmo")
    with pytest.raises(UserError, match="model_type='olmo'; expected 'llama'"):
        merge_checkpoints(base, [tmp_path / "olmo"], tmp_path / "out", first)


def test_what_the_arithmetic_ignores_may_differ(tmp_path: Path) -> None:
    """Catches a refusal because another program wrote the fine-tuned model's config."""
    base = checkpoint(tmp_path / "base")
    tuned = checkpoint(tmp_path / "tuned", 1, torch.bfloat16, eos_token_id=5, use_cache=False)
    merge_checkpoints(base, [tuned], tmp_path / "out", first)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    """Catches a traceback, and half a model under the final name."""
    base, out = checkpoint(tmp_path / "base"), checkpoint(tmp_path / "out", 1)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"out: cannot be written .*; free some space"):
            merge_checkpoints(base, [], out, first)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


MEASURE = """
import re, sys
from pathlib import Path
import torch
from cfs.model.merging import merge_checkpoints

torch.set_num_threads(1)
small, base, out = map(Path, sys.argv[1:])

def peak_bytes():  # of this process alone: ru_maxrss starts at what the parent had
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def average(name, original, tuned):
    return (original + tuned[0]) / 2

kept = []
def hoard(name, original, tuned):
    kept.append(average(name, original, tuned))
    return kept[-1]

merge_checkpoints(small, [small], out, average)  # code and allocator warm
for function in (average, hoard):
    before = peak_bytes()
    merge_checkpoints(base, [base], out, function)
    print(peak_bytes() - before)
print(max(value.nbytes for value in kept), sum(value.nbytes for value in kept))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_that_of_a_few_parameters(tmp_path: Path) -> None:
    """Catches a merge that holds a model, or a shard of the result, in memory."""
    many: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 14}
    base = checkpoint(tmp_path / "base", **many)
    places = [checkpoint(tmp_path / "small"), base, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, places)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    streamed, hoarded, largest, size = map(int, done.stdout.split())
    allowed = 8 * largest + 8 * 2**20  # some for the interpreter and its allocators
    assert size > 3 * allowed
    assert hoarded > size / 2  # or the measurement would see nothing
    assert streamed <= allowed
