"""One part of a corpus: samples to a parquet file and back, with its SHA-256 beside it.

`part-00000.parquet`     the rows
`.part-00000.sha256`     what the file's SHA-256 must be, as sha256sum writes it; written first and
                         kept until the manifest holds it. A part without it counts as not drawn.

Shapes: K head tokens stored per position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cfs.errors import UserError
from cfs.files import blaming, sha256, write_atomically, writing_file
from cfs.sample.sample import Sample, TopK

COLUMNS = [
    ("index", pa.int64()),
    ("input_ids", pa.list_(pa.int32())),
    ("num_prompt_tokens", pa.int32()),
    ("logprob_model", pa.list_(pa.float32())),
    ("logprob_sampler", pa.list_(pa.float32())),
    ("finish_reason", pa.string()),
    ("text", pa.string()),
]
TOPK_COLUMNS = [
    ("topk_ids", pa.list_(pa.list_(pa.int32()))),
    ("topk_logprobs", pa.list_(pa.list_(pa.float32()))),
    ("rest_mass", pa.list_(pa.float32())),
]
RESUME = "finished parts stay: once it can be, the same command goes on from there"
REPAIR = (
    "run generate.py with this corpus's flags and --repair, or delete the directory to have it "
    "drawn again"
)


def part_file(corpus: Path, number: int) -> Path:
    """Where part `number` is."""
    return corpus / f"part-{number:05d}.parquet"


def write_part(file: Path, samples: list[Sample], decode: Callable[[list[int]], str]) -> None:
    """Put a part at `file` in one step, its SHA-256 before it.

    decode  generated ids to the `text` column

    A kill in between leaves a record without its part, which is then drawn again. Raises
    `UserError` where the disk refuses, with nothing half written left behind.
    """
    with blaming(file, RESUME), writing_file(file) as temporary:
        pq.write_table(_to_table(samples, decode), temporary)
        record_sha256(file, sha256(temporary))


def record_sha256(file: Path, digest: str) -> None:
    """Note beside a part what its SHA-256 must be."""
    write_atomically(_record(file), f"{digest}  {file.name}\n")


def recorded_sha256(file: Path) -> str | None:
    """The SHA-256 noted beside a part, if one is."""
    record = _record(file)
    return record.read_text("utf-8", errors="replace")[:64] if record.is_file() else None


def remove_records(corpus: Path) -> None:
    """Drop the notes of a corpus whose manifest holds them."""
    for record in corpus.glob(".part-*.sha256"):
        record.unlink(missing_ok=True)


def is_intact(file: Path, digest: str | None) -> bool:
    """Is the part there, and what `digest` says?"""
    return digest is not None and file.is_file() and sha256(file) == digest


def read_part(file: Path, digest: str) -> Iterator[Sample]:
    """The samples of a part. `UserError` where it is not what was drawn."""
    if not file.is_file():
        raise UserError(f"{file}: is missing; {REPAIR}")
    with blaming(file, "check its permissions and its disk", "read"):
        content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{file}: is damaged (its SHA-256 differs from the manifest's); {REPAIR}")
    # Not pq.read_table: its threads may still run when the interpreter ends, and then abort it
    # (apache/arrow issue 34314).
    with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as parquet:
        table = parquet.read(use_threads=False)
    yield from _to_samples(table)


def _record(file: Path) -> Path:
    return file.with_name(f".{file.stem}.sha256")


def _to_table(samples: list[Sample], decode: Callable[[list[int]], str]) -> pa.Table:
    columns: dict[str, list | pa.Array] = {
        "index": [s.index for s in samples],
        "input_ids": [s.input_ids for s in samples],
        "num_prompt_tokens": [s.num_prompt_tokens for s in samples],
        "logprob_model": [s.logprob_model for s in samples],
        "logprob_sampler": [s.logprob_sampler for s in samples],
        "finish_reason": [s.finish_reason for s in samples],
        "text": [decode(s.input_ids[s.num_prompt_tokens :].tolist()) for s in samples],
    }
    heads = [s.topk for s in samples if s.topk is not None]
    if not heads:
        return pa.table(columns, schema=pa.schema(COLUMNS))
    assert len(heads) == len(samples), "all samples of a part have their top-k, or none"
    columns["topk_ids"] = _nested([head.ids for head in heads])
    columns["topk_logprobs"] = _nested([head.logprobs for head in heads])
    columns["rest_mass"] = [head.rest_mass for head in heads]
    return pa.table(columns, schema=pa.schema(COLUMNS + TOPK_COLUMNS))


def _nested(arrays: list[np.ndarray]) -> pa.Array:
    """A list<list> column of one (n, K) array a row, without a Python object per number."""
    width, lengths = arrays[0].shape[1], [len(a) for a in arrays]
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    inner = pa.ListArray.from_arrays(np.arange(sum(lengths) + 1, dtype=np.int32) * width, flat)
    return pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), inner)


def _to_samples(table: pa.Table) -> Iterator[Sample]:
    ids, model, sampler = (
        _rows(table, name) for name in ("input_ids", "logprob_model", "logprob_sampler")
    )
    heads = _heads(table) if "topk_ids" in table.column_names else [None] * len(ids)
    scalars = table.select(["index", "num_prompt_tokens", "finish_reason"]).to_pylist()
    for row, scalar in enumerate(scalars):
        yield Sample(
            input_ids=ids[row],
            logprob_model=model[row],
            logprob_sampler=sampler[row],
            topk=heads[row],
            **scalar,
        )


def _rows(table: pa.Table, name: str) -> list[np.ndarray]:
    """A list column as one array per row."""
    return [np.asarray(value.values) for value in table[name]]


def _heads(table: pa.Table) -> list[TopK | None]:
    ids, logprobs = (
        [np.asarray(v.values.flatten()).reshape(len(v.values), -1) for v in table[name]]
        for name in ("topk_ids", "topk_logprobs")
    )
    return [TopK(*head) for head in zip(ids, logprobs, _rows(table, "rest_mass"), strict=True)]
