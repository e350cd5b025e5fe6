"""A damaged checkpoint is named and refused, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cfs.errors import UserError
from cfs.train import manifest
from cfs.train.checkpoint import load, saved_tensors, verify
from cfs.train.manifest import FileRecord, Manifest
from tests.conftest import ALONE
from tests.train.checkpoints import SHARD, saved, tensors_of


def truncate(path: Path) -> Path:
    os.truncate(path / SHARD, 100)
    return path / SHARD


def flip_a_bit(path: Path) -> Path:
    content = bytearray((path / SHARD).read_bytes())
    content[-1] ^= 1
    (path / SHARD).write_bytes(content)
    return path / SHARD


def lose_a_file(path: Path) -> Path:
    (path / SHARD).unlink()
    return path / SHARD


def add_a_file(path: Path) -> Path:
    shutil.copy(path / SHARD, path / "rank-00001.safetensors")
    return path / "rank-00001.safetensors"


def lose_the_manifest(path: Path) -> Path:
    (path / "manifest.json").unlink()
    return path / "manifest.json"


def empty_the_manifest(path: Path) -> Path:
    (path / "manifest.json").write_bytes(b"")
    return path / "manifest.json"


def change_a_fact(path: Path) -> Path:
    file = path / "manifest.json"
    text = file.read_text()
    assert '"facts": {\n  "step": 3' in text
    file.write_text(text.replace('"facts": {\n  "step": 3', '"facts": {\n  "step": 2'))
    return file


def make_the_manifest_another_value(path: Path) -> Path:
    (path / "manifest.json").write_text('["sha256"]')
    return path / "manifest.json"


DAMAGES = [
    truncate,
    flip_a_bit,
    lose_a_file,
    add_a_file,
    lose_the_manifest,
    empty_the_manifest,
    change_a_fact,
    make_the_manifest_another_value,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_intact_one_offered(
    tmp_path: Path, damage: Callable[[Path], Path]
) -> None:
    """Catches damage that goes unseen, or is told without the file and the way out."""
    first, second, third = saved(tmp_path, 1, 2, 3)
    flip_a_bit(second)
    file = damage(third)
    with pytest.raises(UserError) as caught:
        verify(third, ALONE)
    message = str(caught.value)
    assert message.startswith(f"{file}: is ")
    assert f"remove {third}, and --resume goes on from step-000001, which is intact" in message
    flip_a_bit(first)
    with pytest.raises(UserError, match="no intact checkpoint is left; start again in another"):
        verify(third, ALONE)


@pytest.mark.parametrize("damage", [truncate, lose_a_file, add_a_file, change_a_fact])
def test_a_file_more_or_less_is_not_loaded(tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    """Catches tensors that stay as they were where their part is missing, if nobody verifies."""
    [path] = saved(tmp_path, 3)
    damage(path)
    for read in (lambda: load(path, tensors_of(0), ALONE), lambda: saved_tensors(path)):
        with pytest.raises(UserError, match=f"{path}/"):
            read()


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint of another version of cfs that is taken for this one's, or called
    damaged, so that the user removes it."""
    monkeypatch.setattr(manifest, "FORMAT", 2)
    [path] = saved(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"is of format 2, where 1 is read; resume with the version"
    ):
        verify(path, ALONE)


class Payload:
    """A pickle that creates a file where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.pt", SHARD])
def test_a_planted_payload_is_refused(tmp_path: Path, name: str) -> None:
    """Catches any reader that unpickles: what was planted is named, and not executed."""
    [path] = saved(tmp_path / "checkpoints", 1)
    trace = tmp_path / "trace"
    (path / name).write_bytes(pickle.dumps(Payload(trace)))
    for read in (verify, lambda path, ranks: load(path, tensors_of(0), ranks)):
        with pytest.raises(UserError, match=f"{path / name}: is "):
            read(path, ALONE)
    assert not trace.exists()
    pickle.loads((path / name).read_bytes())
    assert trace.exists(), "the payload works"


def test_a_payload_with_a_manifest_that_fits_is_not_executed(tmp_path: Path) -> None:
    """Catches a reader that falls back to pickle where a file's name promises safetensors."""
    [path] = saved(tmp_path / "checkpoints", 1)
    trace = tmp_path / "trace"
    (path / SHARD).write_bytes(pickle.dumps(Payload(trace)))
    Manifest(1, 1, {}, {SHARD: FileRecord.of(path / SHARD)}).write(path)
    with pytest.raises(UserError, match=f"{path}: holds a file that is not safetensors"):
        load(path, tensors_of(0), ALONE)
    assert not trace.exists()


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    """Catches a manifest that tools and people cannot check without cfs."""
    [path] = saved(tmp_path, 3)
    content = json.loads((path / "manifest.json").read_text())
    record = FileRecord.of(path / SHARD)
    assert content["files"] == {SHARD: {"num_bytes": record.num_bytes, "sha256": record.sha256}}
    assert (content["format"], content["step"], content["world_size"]) == (1, 3, 1)
    assert (path / SHARD).stat().st_mode & 0o777 == path.stat().st_mode & 0o666
