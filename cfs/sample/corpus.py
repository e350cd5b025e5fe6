"""A corpus of samples on disk: parquet parts that appear whole, under one manifest.

`OUT/manifest.json`    settings, fingerprints, counts, SHA-256 of each part; written last
`OUT/settings.json`    the settings alone; there from the start, so that resuming can hold them
                       against what it is asked for
`OUT/part-00000.parquet ...`  samples [0, 256), [256, 512), ... in rising order of index

Part k is the work of rank k mod world_size. What a part holds depends on its number alone, so
any number of ranks writes the same corpus, and an interrupted one goes on with the parts it lacks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cfs.errors import UserError
from cfs.files import write_atomically, writing_file
from cfs.model import Decoder
from cfs.sample.sampler import Request, Sample, SamplingSettings, generate

SAMPLES_PER_PART = 256
MANIFEST, SETTINGS, LOCK = "manifest.json", "settings.json", ".lock"
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("num_prompt_tokens", pa.int32()),
        ("logprob_model", pa.list_(pa.float32())),
        ("logprob_sampler", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class CorpusSettings:
    """Everything that decides a corpus's rows, up to float rounding."""

    model: str
    """Fingerprint of the checkpoint's files."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    num_samples: int
    prompt_ids: list[int]
    sampling: SamplingSettings
    dtype: str
    version: int = field(default=1)

    def fingerprint(self) -> str:
        """Name of the corpus in the cache: 16 hexadecimal digits."""
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Samples read back, in rising order of index."""

    manifest: dict[str, Any]
    samples: list[Sample]


def model_fingerprint(directory: str | Path) -> str:
    """SHA-256 over config.json and every safetensors file of a checkpoint."""
    digest = hashlib.sha256()
    for file in [Path(directory) / "config.json", *sorted(Path(directory).glob("*.safetensors"))]:
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def write_corpus(
    directory: str | Path,
    model: Decoder,
    settings: CorpusSettings,
    eos_id: int,
    num_tokens: int,
    num_slots: int,
    decode: Callable[[list[int]], str],
    parts: list[range],
    on_sample: Callable[[Sample], None] = lambda sample: None,
) -> None:
    """Draw some parts, between one `begin_corpus` and one `finish_corpus`.

    decode     generated ids to the `text` column
    parts      sample indices of each, from `missing_parts`
    on_sample  called for each finished sample, for progress
    """
    done: dict[range, list[Sample]] = {part: [] for part in parts}
    part_of = {i: part for part in parts for i in part}
    requests = (Request(i, settings.prompt_ids) for i in part_of)
    for sample in generate(
        model,
        requests,
        settings.sampling,
        eos_id,
        num_tokens,
        num_slots,
        max_prompt_tokens=len(settings.prompt_ids),
    ):
        on_sample(sample)
        part = part_of[sample.index]
        done[part].append(sample)
        if len(done[part]) == len(part):
            rows = sorted(done.pop(part), key=lambda s: s.index)
            with writing_file(_file(Path(directory), part)) as temporary:
                pq.write_table(_table(rows, decode), temporary)


def missing_parts(
    directory: str | Path, settings: CorpusSettings, rank: int, world_size: int
) -> list[range]:
    """The sample indices of each part that this rank has yet to draw."""
    own = _parts(settings.num_samples)[rank::world_size]
    return [part for part in own if not _file(Path(directory), part).exists()]


@contextmanager
def opened_corpus(directory: str | Path, settings: CorpusSettings) -> Iterator[bool]:
    """Hold the corpus against other processes; is it complete already?

    An absent one is begun. While another run draws the same corpus this waits for it. Raises
    `UserError` where the directory cannot be made, or holds something else.
    """
    out = Path(directory)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out}: another run is drawing this corpus; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        check_settings(out, settings)
        write_atomically(out / SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")
        yield is_complete(out)


def finish_corpus(directory: str | Path, settings: CorpusSettings) -> None:
    """Write the manifest over a corpus whose parts are all there."""
    out = Path(directory)
    parts = []
    for part in _parts(settings.num_samples):
        file = _file(out, part)
        parts.append({"file": file.name, "samples": len(part), "sha256": _sha256(file)})
    manifest = {"settings": asdict(settings), "num_samples": settings.num_samples, "parts": parts}
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def is_complete(directory: str | Path) -> bool:
    """Has the corpus been closed?"""
    return (Path(directory) / MANIFEST).is_file()


def check_settings(directory: Path, settings: CorpusSettings) -> None:
    """Refuse to mix two corpora: `UserError` names the first setting that differs."""
    if not (directory / SETTINGS).is_file():
        if any(not file.name.startswith(".") for file in directory.iterdir()):
            raise UserError(f"{directory}: not empty and not a corpus; choose another --out")
        return
    there = _flat(_read_json(directory / SETTINGS))
    for key, wanted in _flat(json.loads(json.dumps(asdict(settings)))).items():
        if there.get(key) != wanted:
            raise UserError(
                f"{directory}: was begun with {key}={there.get(key)!r}, not {wanted!r}; "
                "choose another --out or the same settings"
            )


def read_corpus(directory: str | Path) -> Corpus:
    """Every sample of a closed corpus. `UserError` for one that is missing, open or damaged."""
    out = Path(directory)
    if not is_complete(out):
        state = (
            "is not finished; run generate.py again to go on" if out.is_dir() else "is not there"
        )
        raise UserError(f"{out}: corpus {state}")
    manifest = _read_json(out / MANIFEST)
    samples: list[Sample] = []
    for part in manifest["parts"]:
        file = out / part["file"]
        if not file.is_file() or _sha256(file) != part["sha256"]:
            found = "is damaged" if file.is_file() else "is missing"
            raise UserError(
                f"{file}: {found} (SHA-256 differs from {MANIFEST}); delete the corpus and "
                "generate it again"
            )
        samples += _samples(pq.read_table(file, schema=SCHEMA))
    return Corpus(manifest, samples)


def _parts(num_samples: int) -> list[range]:
    """Sample indices of each part."""
    starts = range(0, num_samples, SAMPLES_PER_PART)
    return [range(s, min(s + SAMPLES_PER_PART, num_samples)) for s in starts]


def _file(out: Path, part: range) -> Path:
    return out / f"part-{part.start // SAMPLES_PER_PART:05d}.parquet"


def _table(samples: list[Sample], decode: Callable[[list[int]], str]) -> pa.Table:
    columns = {
        "index": [s.index for s in samples],
        "input_ids": [s.input_ids for s in samples],
        "num_prompt_tokens": [s.num_prompt_tokens for s in samples],
        "logprob_model": [s.logprob_model for s in samples],
        "logprob_sampler": [s.logprob_sampler for s in samples],
        "finish_reason": [s.finish_reason for s in samples],
        "text": [decode(s.input_ids[s.num_prompt_tokens :].tolist()) for s in samples],
    }
    return pa.table(columns, schema=SCHEMA)


def _samples(table: pa.Table) -> Iterator[Sample]:
    ids, model, sampler = (
        [np.asarray(value.values) for value in table[name]]
        for name in ("input_ids", "logprob_model", "logprob_sampler")
    )
    scalars = table.select(["index", "num_prompt_tokens", "finish_reason"]).to_pylist()
    for row, scalar in enumerate(scalars):
        yield Sample(
            input_ids=ids[row], logprob_model=model[row], logprob_sampler=sampler[row], **scalar
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file}: damaged ({error}); delete the corpus and draw it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged (no object); delete the corpus and draw it again")
    return content


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "sampling"} | settings.get("sampling", {})


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
