"""What the tests of checkpoints run in processes of their own.

torchrun --nproc-per-node 2 -m tests.train.checkpoint_worker DEED DIRECTORY [ARGUMENT]
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cfs import cli, ranks
from cfs.ranks import Ranks
from cfs.train import checkpoint, tensor_files
from cfs.train.checkpoint import Checkpoints, latest, load, read_facts, saved_tensors, verify
from cfs.train.manifest import Manifest
from cfs.train.parallel import LocalShard, local_part

WORKER = ("-m", "tests.train.checkpoint_worker")
FACTS = {"order": [3, 1, 2], "loss": 0.1, "note": None}


def whole_tensors() -> dict[str, Tensor]:
    """Those that are sharded by rows: into uneven parts, empty ones and every dtype of a run."""
    torch.manual_seed(5)
    return {
        "uneven": torch.randn(7, 5),
        "one_row": torch.randn(1, 3),
        "vector": torch.randn(5).bfloat16(),
        "codes": torch.randint(0, 256, (9, 4), dtype=torch.uint8),
    }


def state(of: Ranks, saved_on: int, step: int = 1) -> dict[str, Tensor]:
    """Sharded tensors, plain ones that all ranks have, and one that only some of them have."""
    tensors = {name: tensor + step for name, tensor in whole_tensors().items()}
    if of.world_size > 1:
        mesh = init_device_mesh("cpu", (of.world_size,))
        tensors = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in tensors.items()}
    weight = LocalShard("weight", nn.Parameter(tensors["uneven"]))
    tensors["like_weight"] = weight.like((weight.local * 2).to(torch.float64))
    own = of.rank % saved_on
    return tensors | {
        "weight": weight.parameter,
        "no_dimension": torch.tensor(2.5 + step),
        "count": torch.tensor([step, 2**40]),
        f"of_rank_{own}": torch.full((2, own + 1), own + step, dtype=torch.bfloat16),
    }


def save_two(directory: Path, of: Ranks) -> None:
    checkpoints = Checkpoints(directory, of)
    for step in (1, 2):
        tensors = state(of, of.world_size, step)
        checkpoints.save(step, tensors, FACTS)
        for tensor in tensors.values():
            local_part(tensor.detach()).zero_()
        if of.world_size > 1:
            dist.barrier()  # while the other thread's group is at work
    checkpoints.finish()


def check(directory: Path, of: Ranks, saved_on: int, step: int = 2) -> None:
    """Is the newest checkpoint that of `step`, and as it was saved?"""
    path = latest(directory)
    assert path is not None
    assert path.name == f"step-{step:06d}"
    verify(path, of)
    expected = state(of, saved_on, step)
    loaded = state(of, saved_on, step=7)
    load(path, loaded, of)
    for name, tensor in loaded.items():
        assert isinstance(tensor, DTensor) == isinstance(expected[name], DTensor), name
        assert torch.equal(local_part(tensor.detach()), local_part(expected[name].detach())), name
    assert read_facts(path) == FACTS
    stored = saved_tensors(path)
    assert {f"of_rank_{rank}" for rank in range(saved_on)} < stored.keys()
    assert stored["one_row"] == ((1, 3), torch.float32)


def save_on_full_disk(directory: Path, of: Ranks) -> None:
    """Rank 1 alone finds no room for the third checkpoint."""
    save_two(directory, of)
    if of.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    checkpoints = Checkpoints(directory, of)
    checkpoints.save(3, state(of, of.world_size, 3), FACTS)
    checkpoints.finish()


def die_while_saving(directory: Path, of: Ranks) -> None:
    """Rank 1 ends within a write, and rank 0 may take its time to notice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's
    save_two(directory, of)
    if of.rank == 1:
        checkpoint.write_tensors = lambda *_: os._exit(9)
    Checkpoints(directory, of).save(3, state(of, of.world_size, 3), FACTS, wait=True)


def be_killed_while_saving(directory: Path, of: Ranks, where: str) -> None:
    """At the third checkpoint: with half a file written, without a manifest, or once the first
    checkpoint is half removed."""
    save_two(directory, of)

    def half_a_file(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
        file.write_bytes(b"\x40")
        os._exit(9)

    def half_a_removal(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            os._exit(9)

    if where == "tensors":
        tensor_files.save_file = half_a_file
    elif where == "manifest":
        Manifest.write = lambda *_: os._exit(9)
    else:
        shutil.rmtree = half_a_removal
    Checkpoints(directory, of).save(3, state(of, of.world_size, 3), FACTS, wait=True)


def main() -> None:
    deed, directory, *rest = sys.argv[1:]
    of = ranks.start("cpu")
    torch.set_num_threads(1)
    deeds = {
        "save": save_two,
        "check": lambda path, of: check(path, of, int(rest[0])),
        "kill": lambda path, of: be_killed_while_saving(path, of, rest[0]),
        "full": save_on_full_disk,
        "die": die_while_saving,
    }
    deeds[deed](Path(directory), of)


if __name__ == "__main__":
    cli.run(main)
