"""Loading is strict and saving is atomic."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfs.errors import UserError
from cfs.model import load_model, save_model
from cfs.model.saving import save_tensors
from cfs.model.weights import stored_name
from tests.conftest import REPOSITORY, run_python, tiny_config, tiny_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(tiny_model("llama", rms_norm_eps=1e-5), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(tiny_model("llama"), tmp_path / "sharded", max_shard_bytes=20_000)
    return tmp_path / "sharded"


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    """Catches a dtype that is refused, or silently widened or narrowed."""
    model = tiny_model("olmo")
    save_model(model, tmp_path / "m", dtype=dtype)
    loaded = load_model(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for ours, stored in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.to(dtype), stored)
    assert load_model(tmp_path / "m", dtype=torch.float32).embed_tokens.weight.dtype == (
        torch.float32
    )


def test_shards_equal_one_file(sharded: Path) -> None:
    """Catches a tensor lost or doubled between shards."""
    model = tiny_model("llama")
    loaded = load_model(sharded)
    for (name, ours), (other, stored) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, stored)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "gpt2", "model_type 'gpt2'"),
        ("model_type", None, "model_type None"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("attention_bias", True, "attention_bias=True"),
        ("mlp_bias", True, "mlp_bias=True"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_type 'yarn'"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor=None"),
        ("rope_scaling", {"rope_type": "llama3", "factor": "x"}, "factor='x'"),
        ("rope_scaling", "yarn", "rope_scaling='yarn'"),
        ("rope_theta", "x", "rope_theta='x'"),
        ("rms_norm_eps", -1, "rms_norm_eps=-1"),
        ("num_key_value_heads", 3, "num_key_value_heads=3"),
        ("hidden_size", "32", "hidden_size='32'"),
        ("hidden_size", 64, "shape"),
        ("vocab_size", 96, "has shape (97, 32); config.json asks for (96, 32)"),
        ("num_hidden_layers", 3, "model.layers.2.input_layernorm.weight"),
        ("num_hidden_layers", 1, "model.layers.1.input_layernorm.weight is not part"),
        ("tie_word_embeddings", True, "lm_head.weight differs"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
    ],
)
def test_bad_config_is_named(checkpoint: Path, key: str, value: object, said: str) -> None:
    """Catches arithmetic that is silently wrong for an option we do not implement."""
    edit_json(checkpoint / "config.json", lambda c: c.update({key: value}))
    with pytest.raises(UserError) as caught:
        load_model(checkpoint)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[10:20] = b"\xff" * 10
    file.write_bytes(content)


def huge_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def drop_tensor(file: Path) -> None:
    edit_tensors(file, lambda t: t.pop("model.norm.weight"))


def add_tensor(file: Path) -> None:
    edit_tensors(file, lambda t: t.update({"model.extra": torch.ones(2)}))


def misshape_tensor(file: Path) -> None:
    edit_tensors(file, lambda t: t.update({"model.norm.weight": torch.ones(31)}))


def make_integer(file: Path) -> None:
    edit_tensors(file, lambda t: t.update({"model.norm.weight": torch.ones(32).int()}))


def only_pickle(file: Path) -> None:
    file.rename(file.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "damaged"),
        (corrupt_header, "damaged"),
        (huge_header, "damaged"),
        (lambda f: f.write_bytes(b""), "damaged"),
        (drop_tensor, "model.norm.weight missing"),
        (add_tensor, "model.extra is not part"),
        (misshape_tensor, "shape (31,)"),
        (make_integer, "dtype I32"),
        (only_pickle, "pickled weights"),
        (lambda f: f.unlink(), "neither model.safetensors"),
    ],
)
def test_bad_file_is_named(checkpoint: Path, damage: Callable[[Path], None], said: str) -> None:
    """Catches a damaged checkpoint that loads, or dies with somebody else's traceback."""
    damage(checkpoint / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(checkpoint)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i["weight_map"].update({"lm_head.weight": "../secret.safetensors"}), "secret"),
        (lambda i: i["weight_map"].update({"lm_head.weight": "/etc/passwd"}), "same"),
        (lambda i: i["weight_map"].update({"lm_head.weight": "gone.safetensors"}), "gone"),
        (lambda i: i["weight_map"].update({"lm_head.weight": "pickle.bin"}), "pickle.bin"),
        (lambda i: i.pop("weight_map"), "not a safetensors index"),
        (lambda i: i["weight_map"].update({"no.such": sorted(i["weight_map"].values())[0]}), "no."),
    ],
)
def test_bad_index_is_named(sharded: Path, change: Callable[[dict], None], said: str) -> None:
    """Catches an index that leads out of its directory, or to nothing."""
    (sharded.parent / "secret.safetensors").write_bytes(b"outside")
    edit_json(sharded / "model.safetensors.index.json", change)
    with pytest.raises(UserError) as caught:
        load_model(sharded)
    assert said in str(caught.value)


def test_user_errors_are_one_line_and_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a traceback where a sentence belongs, on the real command line."""
    save_model(tiny_model("llama", vocab_size=2000), checkpoint)
    truncate(checkpoint / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "cfs" / "assets" / "tinyworld" / name, checkpoint)
    done = run_python(
        "generate.py", "--model", str(checkpoint), "--out", str(tmp_path / "out"), "--device", "cpu"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr
    assert not (tmp_path / "out").exists()


def test_tied_copy_and_legacy_buffers_are_accepted(tmp_path: Path) -> None:
    """Catches refusing published checkpoints that store the tied head or old rotary buffers."""
    save_model(tiny_model("llama", tie_word_embeddings=True), tmp_path / "m")

    def add(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(tmp_path / "m" / "model.safetensors", add)
    load_model(tmp_path / "m")


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_full_disk_leaves_the_old_model(checkpoint: Path) -> None:
    """Catches a half-written directory under the final name, or beside it."""
    before, (soft, hard) = content(checkpoint), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # amid a tensor
    try:
        with pytest.raises(OSError, match="File too large"):
            save_model(tiny_model("llama", seed=1), checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(checkpoint) == before
    assert [f.name for f in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 10**9])
def test_files_are_laid_out_as_the_format_says(
    dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path
) -> None:
    """Catches offsets that only our own reader forgives, and shards that are too large."""
    model = tiny_model("llama", hidden_size=40, num_hidden_layers=3)
    save_model(model, tmp_path / "m", dtype, max_shard_bytes)
    written: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "m").glob("*.safetensors")):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        assert length % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
        assert [entry["data_offsets"][0] for entry in header.values()] == ends[:-1]
        assert len(raw) == 8 + length + ends[-1]
        assert len(header) == 1 or ends[-1] <= max_shard_bytes
        written |= load_file(file)
    assert list(written) == [stored_name(name) for name, _ in model.named_parameters()]
    for value, stored in zip(model.parameters(), written.values(), strict=True):
        assert torch.equal(value.to(dtype), stored)
    index = tmp_path / "m" / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes < 10**9)
    if index.exists():
        size = json.loads(index.read_text())["metadata"]["total_size"]
        assert size == sum(value.nbytes for value in written.values())


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """Catches a shard that is gathered in memory before it is written."""
    model, given = tiny_model("llama"), []

    def fresh(parameter: torch.Tensor) -> torch.Tensor:
        value = parameter.detach().clone()
        given.append(weakref.ref(value))
        return value

    def arriving() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            assert all(ref() is None for ref in given)
            yield name, fresh(parameter)

    save_tensors(model.config, arriving(), tmp_path / "m", None, torch.float32)
    assert len(given) == len(list(model.parameters()))


def test_tensors_in_another_order_are_no_checkpoint(checkpoint: Path) -> None:
    """Catches a caller's order, or number, that puts values under other parameters' names."""
    model, before = tiny_model("llama"), content(checkpoint)
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    extra = ("extra", torch.ones(1))
    for tensors in (named[::-1], named[:-1], [*named, extra], [*named[:-1], extra]):
        with pytest.raises(AssertionError, match="arrived"):
            save_tensors(model.config, tensors, checkpoint, None, torch.float32)
    assert content(checkpoint) == before


def test_mixed_dtypes_are_stored_as_the_widest(tmp_path: Path) -> None:
    """Catches a model that loses digits, or a config.json that names another dtype."""
    model = tiny_model("llama").to(torch.bfloat16)
    model.norm.float()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "float32"
    for value, stored in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(value.float(), stored)


def test_a_dtype_without_a_name_is_refused(checkpoint: Path) -> None:
    """Catches a checkpoint that could not be loaded again."""
    with pytest.raises(UserError, match="int8"):
        save_model(load_model(checkpoint), checkpoint, dtype=torch.int8)


def test_saving_over_a_model_replaces_it(checkpoint: Path) -> None:
    """Catches tensors of the old model surviving beside the new ones."""
    (checkpoint / "stale.txt").write_text("old")
    other = tiny_model("llama", seed=1)
    save_model(other, checkpoint)
    assert torch.equal(load_model(checkpoint).embed_tokens.weight, other.embed_tokens.weight)
    assert not (checkpoint / "stale.txt").exists()


def test_companion_files_travel(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a result that cannot be used because its tokenizer stayed behind."""
    save_model(load_model(tinyworld), tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tinyworld / name).read_bytes()
    ours, theirs = (
        json.loads((p / "config.json").read_text()) for p in (tmp_path / "copy", tinyworld)
    )
    assert ours == theirs


MEASURE_LOAD = """
import resource, sys, torch
from cfs.model import load_model
load_model(sys.argv[2])  # code and allocator warm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(p.nbytes for p in model.parameters())
largest = max(p.nbytes for p in model.parameters())
print((peak - before) * 1024, size, largest)
"""


def test_loading_peaks_at_one_tensor_beyond_the_parameters(tmp_path: Path) -> None:
    """Catches reading the whole file, or a random initialisation, beside the parameters."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 16000}
    save_model(tiny_model("llama", num_hidden_layers=6, **wide), tmp_path / "big")
    save_model(tiny_model("llama"), tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_LOAD, str(tmp_path / "big"), str(tmp_path / "small")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    grown, size, largest = map(int, done.stdout.split())
    slack = 8 * resource.getpagesize() * 256  # 8 MiB for the interpreter
    assert size > 4 * largest
    assert grown <= size + largest + slack


def test_no_checkpoint_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an obscure error for the commonest mistakes: a wrong path, a file, no config."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "config.json"),
    ):
        with pytest.raises(UserError, match=said):
            load_model(path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not to be had from the hub") as caught:
        load_model("some-owner/some-model")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(UserError, match="neither"):
        load_model(tmp_path / "empty")
