"""What a checkpoint directory consists of, and whether it still does.

`checkpoints/step-000123/` holds safetensors files and `manifest.json`: format version, step,
world size, the caller's facts, the size and SHA-256 of every file, and the manifest's own SHA-256.
Names that start with a dot are unfinished or on their way out; nothing reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cfs.errors import MainRankError, UserError
from cfs.files import blaming, fsync, sha256
from cfs.ranks import Ranks

Result = TypeVar("Result")

MANIFEST = "manifest.json"
FORMAT = 1
"""Of what the manifest says and of how tensors are named and cut; another one is refused."""


class DamageError(UserError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written."""

    num_bytes: int
    sha256: str

    @staticmethod
    def of(file: Path) -> FileRecord:
        return FileRecord(file.stat().st_size, sha256(file))


@dataclass(frozen=True)
class Manifest:
    """facts  the caller's, JSON-able; files  by name, the manifest itself left out"""

    step: int
    world_size: int
    facts: dict[str, Any]
    files: dict[str, FileRecord]

    def write(self, directory: Path) -> None:
        content = {"format": FORMAT, **asdict(self)}
        sealed = {**content, "sha256": _seal(content)}
        file = directory / MANIFEST
        file.write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
        fsync(file)

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Raises `DamageError` for a missing or altered one, `UserError` for another format."""
        file = directory / MANIFEST
        with blaming(file, "check the disk", "read"):
            try:
                sealed = json.loads(file.read_bytes())
                seal = sealed.pop("sha256")
                if seal != _seal(sealed):
                    raise DamageError(f"{file}: is damaged (it does not have its own SHA-256)")
                if (version := sealed.pop("format")) != FORMAT:
                    raise UserError(
                        f"{file}: is of format {version}, where {FORMAT} is read; resume with the "
                        "version of cfs that wrote it"
                    )
                records = sealed.pop("files").items()
                files = {name: FileRecord(**record) for name, record in records}
                return Manifest(**sealed, files=files)
            except FileNotFoundError:
                raise DamageError(f"{file}: is missing") from None
            except (JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
                raise DamageError(f"{file}: is damaged (no manifest of a checkpoint)") from None


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def complete_steps(directory: Path) -> dict[int, Path]:
    """The checkpoints that stand under `directory`, in ascending order of their steps."""
    found = {}
    if directory.is_dir():
        for path in directory.iterdir():
            if path.is_dir() and (match := re.fullmatch(r"step-(\d+)", path.name)):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest(directory: Path) -> Path | None:
    """The newest checkpoint under `directory`, or None; its files are not looked at."""
    return next(reversed(complete_steps(directory).values()), None)


def read_facts(path: Path) -> dict[str, Any]:
    """What the caller of `Checkpoints.save` wanted remembered beside the tensors."""
    return Manifest.read(path).facts


def verify(path: Path, ranks: Ranks) -> None:
    """Compare every file of a checkpoint with its SHA-256 in the manifest. Collective.

    The files are dealt over the ranks. Raises `UserError` that names what is damaged, missing or
    too many, and the newest older checkpoint that is intact.
    """
    damage = _damage(path, ranks)
    if damage is None:
        return
    step = int(path.name.removeprefix("step-"))
    for older_step, older in reversed(ranks.on_main(lambda: complete_steps(path.parent)).items()):
        if older_step < step and _damage(older, ranks) is None:
            remedy = f"remove {path}, and --resume goes on from {older.name}, which is intact"
            break
    else:
        remedy = "no intact checkpoint is left; start again in another --out"
    stop(f"{damage}; {remedy}", ranks)


def _damage(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, in words and on every rank; None where all is well."""

    def met_here() -> str | None:
        try:
            files = listed_files(path)
            for name in sorted(files)[ranks.rank :: ranks.world_size]:
                with blaming(path / name, "check the disk", "read"):
                    if sha256(path / name) != files[name].sha256:
                        return f"{path / name}: is damaged (its SHA-256 differs)"
        except DamageError as error:
            return str(error)
        return None

    return next((damage for damage in on_all(met_here, ranks) if damage is not None), None)


def listed_files(path: Path) -> dict[str, FileRecord]:
    """The manifest's files, once it is sure that the directory has them all, and no others.

    Compares names and sizes. Raises `DamageError`, as `Manifest.read` does.
    """
    files = Manifest.read(path).files
    with blaming(path, "check the disk", "read"):
        sizes = {entry.name: entry.stat().st_size for entry in path.iterdir()}
    for name in sorted(sizes.keys() - files.keys() - {MANIFEST}):
        raise DamageError(f"{path / name}: is not in {MANIFEST}, and no part of the checkpoint")
    for name, record in files.items():
        if name not in sizes:
            raise DamageError(f"{path / name}: is missing")
        if sizes[name] != record.num_bytes:
            raise DamageError(
                f"{path / name}: is damaged ({sizes[name]} bytes, written as {record.num_bytes})"
            )
    return files


def on_all(function: Callable[[], Result], ranks: Ranks) -> list[Result]:
    """What `function` gives on each rank, on every rank; a `UserError` of any stops them all."""
    outcome: Result | UserError
    try:
        outcome = function()
    except UserError as error:
        outcome = error
    outcomes = ranks.gather(outcome)
    for other in outcomes:
        if isinstance(other, UserError):
            stop(str(other), ranks)
    return outcomes


def stop(message: str, ranks: Ranks) -> NoReturn:
    """Raise, on every rank alike, what rank 0 is to say."""
    raise UserError(message) if ranks.is_main else MainRankError(message)
