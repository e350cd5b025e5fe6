"""A corpus of samples on disk: parquet parts that appear whole, under one manifest.

`OUT/manifest.json`    settings, fingerprints, counts, SHA-256 of each part; written last
`OUT/settings.json`    the settings alone; there from the start, so that resuming can hold them
                       against what it is asked for
`OUT/part-00000.parquet ...`  samples [0, 256), [256, 512), ... in rising order of index

What a part holds depends on its number alone, so any number of ranks writes the same corpus, and
an interrupted one goes on with the parts it lacks. A damaged part is drawn again by opening the
corpus anew: without its manifest it is one that lacks that part.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from cfs.errors import UserError
from cfs.files import blaming, fsync, write_atomically
from cfs.sample.parts import (
    REPAIR,
    RESUME,
    is_intact,
    part_file,
    read_part,
    record_sha256,
    recorded_sha256,
    remove_records,
)
from cfs.sample.sample import Sample
from cfs.sample.settings import VERSION, CorpusSettings

SAMPLES_PER_PART = 256
MANIFEST, SETTINGS = "manifest.json", "settings.json"
LOCK, DRAWING = ".lock", ".drawing"
STALE = re.compile(r"\.+(part-\d+\.(parquet|sha256)|settings\.json|manifest\.json)\.tmp-\d+")


@dataclass(frozen=True)
class Corpus:
    """Samples read back, in rising order of index."""

    manifest: dict[str, Any]
    samples: list[Sample]


@dataclass(frozen=True)
class OpenedCorpus:
    """What a corpus lacks."""

    missing: list[int]
    """Parts to draw."""
    damaged: list[str]
    """File names of those among them that were there, or ought to have been."""
    is_complete: bool
    """Every part is there and so is the manifest."""


def num_parts(num_samples: int) -> int:
    """Files that so many samples fill."""
    return -(-num_samples // SAMPLES_PER_PART)


def part_number(index: int) -> int:
    """The part that sample `index` is in."""
    return index // SAMPLES_PER_PART


def part_range(number: int, num_samples: int) -> range:
    """Sample indices of part `number`."""
    start = number * SAMPLES_PER_PART
    return range(start, min(start + SAMPLES_PER_PART, num_samples))


# ------------------------------------------------------------------------------------ writing


@contextmanager
def opened_corpus(
    directory: str | Path, settings: CorpusSettings, repair: bool = False
) -> Iterator[OpenedCorpus]:
    """Hold the corpus against other processes, and say what it lacks.

    repair  read every part of a finished corpus too, and open it anew where one is damaged;
            without it a finished corpus is taken at its manifest's word, which reading checks

    An absent corpus is begun; a finished one may lie where nothing can be written. While another
    run draws the same corpus this waits for it. Raises `UserError` where the directory cannot be
    written, or holds something else.
    """
    out = Path(directory)
    if not repair and is_complete(out) and not os.access(out, os.W_OK):
        check_settings(out, settings)
        yield OpenedCorpus([], [], is_complete=True)
        return
    if repair and not any((out / name).is_file() for name in (SETTINGS, MANIFEST)):
        raise UserError(f"--repair: {out} holds no corpus; leave the flag out to draw one")
    with blaming(out, "choose another --out"):
        if out.is_dir():
            check_settings(out, settings, repair)  # before a lock file is left where none belongs
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    with lock:
        with blaming(out, "choose another --out"):
            _wait_for(lock, out)
            with (out / DRAWING).open("w") as orphans:
                _wait_for(orphans, out)
        check_settings(out, settings, repair)
        with blaming(out, RESUME):
            for file in out.iterdir():
                if STALE.fullmatch(file.name):  # of a process that was killed
                    file.unlink(missing_ok=True)
            write_atomically(out / SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")
            opened = _look(out, settings.num_samples, repair)
        yield opened


@contextmanager
def joined_corpus(directory: str | Path) -> Iterator[None]:
    """Say, on every rank that draws, that this corpus is being drawn: should the rank outlive the
    one that opened it, no other run begins before this one ends."""
    with (Path(directory) / DRAWING).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def finish_corpus(directory: str | Path, settings: CorpusSettings) -> None:
    """Write the manifest over a corpus whose parts are all there."""
    out = Path(directory)
    parts = []
    for number in range(num_parts(settings.num_samples)):
        file, samples = part_file(out, number), len(part_range(number, settings.num_samples))
        digest = recorded_sha256(file)
        if digest is None:
            raise UserError(
                f"{file}: another rank drew it, but it is not to be seen here; --out must be a "
                "directory that all ranks share"
            )
        parts.append({"file": file.name, "samples": samples, "sha256": digest})
    manifest = {"settings": asdict(settings), "num_samples": settings.num_samples, "parts": parts}
    with blaming(out / MANIFEST, RESUME):
        write_atomically(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        remove_records(out)


def _wait_for(lock: TextIO, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{out}: another run is drawing this corpus; waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _look(out: Path, num_samples: int, repair: bool) -> OpenedCorpus:
    """Which parts are missing or are not what was recorded when they were drawn?"""
    was_finished = is_complete(out)
    if was_finished and repair:
        _record_manifest(out)
    elif was_finished:
        remove_records(out)  # a kill may have left some
        return OpenedCorpus([], [], is_complete=True)
    files = [part_file(out, number) for number in range(num_parts(num_samples))]
    missing = [n for n, file in enumerate(files) if not is_intact(file, recorded_sha256(file))]
    if was_finished and not missing:
        remove_records(out)
        return OpenedCorpus([], [], is_complete=True)
    if was_finished:
        (out / MANIFEST).unlink()
        fsync(out)
    damaged = [files[n].name for n in missing if was_finished or files[n].exists()]
    return OpenedCorpus(missing, damaged, is_complete=False)


def _record_manifest(out: Path) -> None:
    """Let each part's record say what the manifest says, so that a kill without it costs no part.

    Of a damaged manifest nothing is taken over: what no record vouches for is drawn again.
    """
    with suppress(UserError):
        for part in read_manifest(out)["parts"]:
            record_sha256(out / part["file"], part["sha256"])


# ----------------------------------------------------------------------------------- checking


def check_settings(directory: Path, settings: CorpusSettings, repair: bool = False) -> None:
    """Refuse to mix two corpora: `UserError` names the first setting that differs."""
    there = _settings_there(directory, repair)
    if there is None:
        if any(not file.name.startswith(".") for file in directory.iterdir()):
            raise UserError(f"{directory}: not empty and not a corpus; choose another --out")
        return
    difference = settings.difference(there)
    if difference is not None:
        raise UserError(f"{directory}: was {difference}; choose another --out or the same settings")


def _settings_there(directory: Path, repair: bool) -> dict[str, Any] | None:
    """The settings a corpus was begun with; with `repair` the manifest's where they are lost."""
    try:
        if (directory / SETTINGS).is_file():
            return read_json(directory / SETTINGS)
    except UserError:
        if not repair or not is_complete(directory):
            raise
    return read_manifest(directory)["settings"] if is_complete(directory) else None


def is_complete(directory: str | Path) -> bool:
    """Has the corpus been closed?"""
    return (Path(directory) / MANIFEST).is_file()


# ------------------------------------------------------------------------------------ reading


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a closed corpus. `UserError` for one that is missing, open or damaged."""
    out = Path(directory)
    if not is_complete(out):
        state = (
            "is not finished; run generate.py again to go on" if out.is_dir() else "is not there"
        )
        raise UserError(f"{out}: corpus {state}")
    manifest = read_json(out / MANIFEST)
    try:
        version = manifest["settings"]["version"]
        files = [part["file"] for part in manifest["parts"] if part["sha256"]]
        count = sum(part["samples"] for part in manifest["parts"])
        sound = count == manifest["num_samples"] and version >= 1
    except (KeyError, TypeError):
        version, sound, files = 0, False, []
    if not sound or files != [part_file(out, k).name for k in range(len(files))]:
        raise UserError(f"{out / MANIFEST}: damaged (it does not list its parts); {REPAIR}")
    if version > VERSION:
        raise UserError(f"{out}: is in version {version} of the format; this cfs reads {VERSION}")
    return manifest


def stream_corpus(directory: str | Path) -> Iterator[Sample]:
    """The samples of a closed corpus in rising order, held one part at a time.

    Each part is checked as it is reached. Raises `UserError` like `read_corpus`.
    """
    for part in read_manifest(directory)["parts"]:
        yield from read_part(Path(directory) / part["file"], part["sha256"])


def read_corpus(directory: str | Path) -> Corpus:
    """Every sample of a closed corpus. `UserError` for one that is missing, open or damaged."""
    return Corpus(read_manifest(directory), list(stream_corpus(directory)))


def read_json(file: Path) -> dict[str, Any]:
    """An object that this module wrote."""
    try:
        with blaming(file, "check its permissions and its disk", "read"):
            content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: damaged ({error}); {REPAIR}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged (no object); {REPAIR}")
    return content
