"""A checkpoint's tensors in safetensors files, through torch.distributed.checkpoint.

Each rank writes one file, whose header says which part of every tensor it holds; any number of
ranks reads them back. No pickle is read: torch's default reader would unpickle `.metadata`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from cfs.errors import UserError
from cfs.files import blaming, fsync
from cfs.ranks import Ranks
from cfs.train.manifest import DamageError, listed_files, on_all

# torch says so to every lone process, which loses nothing by it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

Staged = tuple[dict[str, Tensor], dict[str, Tensor]]
"""How tensors lie over the ranks, and copies of this rank's parts in host memory."""


def stage(tensors: dict[str, Tensor]) -> Staged:
    """Copy this rank's parts to the host; when it returns, the tensors may change.

    A DTensor's layout is a DTensor on `meta`: around a copy on the host, `from_local` would take
    the copy back to the device of the mesh.
    """
    layout: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        local = value.to_local() if isinstance(value, DTensor) else value
        copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        copies[name] = layout[name] = copy.copy_(local, non_blocking=local.is_cuda)
        if isinstance(value, DTensor):
            layout[name] = DTensor.from_local(
                torch.empty_like(copy, device="meta"),
                value.device_mesh,
                value.placements,
                run_check=False,
                shape=value.shape,
                stride=value.stride(),
            )
    if any(copy.is_pinned() for copy in copies.values()):
        torch.cuda.synchronize()
    return layout, copies


def write_tensors(staged: Staged, directory: Path, ranks: Ranks) -> None:
    """Write what `stage` copied to this rank's file in `directory`, and fsync it. Collective.

    Where any rank fails, all raise: `OSError` for a full disk and its like, `UserError` for a
    rank that ended.
    """
    layout, copies = staged
    with _what_dcp_met():
        state_dict_saver.save(
            layout,
            storage_writer=_Writer(directory, ranks.rank),
            planner=_CopiesPlanner(copies),
            process_group=ranks.hosts,
            no_dist=ranks.world_size == 1,
        )


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def saved_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint, from the files' headers alone.

    Raises `UserError` where the files are not those of the manifest, or are no safetensors files.
    """
    listed_files(path)
    with blaming(path, "check the disk", "read"):
        try:
            stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        except SafetensorError as error:
            raise DamageError(f"{path}: holds a file that is not safetensors ({error})") from error
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill DTensors of any layout and plain tensors, in place. Collective.

    Ranks may ask for different plain tensors, and for fewer than are there. Raises `UserError`,
    before anything is changed, for a tensor that is missing or of another shape or dtype.
    """
    on_all(lambda: _compare(path, tensors), ranks)
    with blaming(path, "check the disk", "read"), _what_dcp_met():
        state_dict_loader.load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=ranks.hosts,
            no_dist=ranks.world_size == 1,
        )


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    stored = saved_tensors(path)
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"{path}: has no tensor {name}; resume with the flags it was made with")
        wanted = (tuple(tensor.shape), tensor.dtype)
        if stored[name] != wanted:
            raise UserError(
                f"{path}: tensor {name} is {_in_words(*stored[name])}, expected "
                f"{_in_words(*wanted)}; resume with the flags it was made with"
            )


def _in_words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


class _CopiesPlanner(DefaultSavePlanner):
    """Plans by the layout, and gives the copies to be written."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copies[index.fqn]


class _Writer(HuggingFaceStorageWriter):
    """torch's writer of safetensors, but straight from the tensors to the disk.

    Its own `write_data` first makes a file's content in memory, twice over, and lets no other
    Python thread run meanwhile: training would stand still.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        super().__init__(str(directory), save_distributed=True)
        self.file = directory / file_name(rank)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        results = []
        for item in plan.items:
            name, tensor = item.index.fqn, planner.resolve_data(item)
            assert isinstance(tensor, Tensor), "nothing but tensors is saved"
            assert item.tensor_data is not None, "so each item has a place in its tensor"
            assert name not in tensors, "a rank holds one piece of a tensor"
            tensors[name] = tensor
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(item.index, tensor.nbytes, self.file.name))
        if tensors:
            # The keys by which torch's reader finds a piece's place.
            header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
            with _os_errors():
                save_file(tensors, self.file, {**header, "format": "pt"})
            # safetensors leaves its files to their owner alone; these go with the directory.
            self.file.chmod(self.file.parent.stat().st_mode & 0o666)
            fsync(self.file)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn what safetensors says of a failed system call back into an `OSError`."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error


@contextmanager
def _what_dcp_met() -> Iterator[None]:
    """Raise the first rank's own exception in place of DCP's, which is no `Exception`."""
    try:
        yield
    except CheckpointException as failure:
        _, (cause, _) = min(failure.failures.items())
        raise cause from failure
    except RuntimeError as error:  # of DCP's collectives: what ranks meet themselves comes as above
        raise UserError(f"another rank ended or does not answer ({error})") from error
