"""A model sharded as it is read, and its l2 penalty once moved.

torchrun --nproc-per-node 4 -m tests.train.sharded MODEL RANKS_PER_COPY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from cfs import ranks as process_ranks
from cfs.baselines.l2 import add_distance
from cfs.cli import run
from cfs.model import load_model
from cfs.train.config import TrainConfig
from cfs.train.endpoints import starting_model
from cfs.train.loop import squared_grad_norm
from cfs.train.parallel import full_parameters
from cfs.train.reference import stored_rows


def main() -> None:
    ranks = process_ranks.start("cpu")
    per_copy = int(sys.argv[2])
    config = TrainConfig(model=sys.argv[1], dtype="float32", shard_ranks=per_copy)
    trained = starting_model(config, Path(sys.argv[1]), ranks)
    whole = dict(load_model(sys.argv[1]).named_parameters())
    for name, value in full_parameters(trained.model):
        assert torch.equal(value, whole[name]), name
    anchors = stored_rows(trained.shards, trained.stored)
    for shard in trained.shards:
        shard.local.mul_(1.5).add_(0.25)
    sums = torch.stack(
        (add_distance(trained.shards, anchors, 0.1), squared_grad_norm(trained.shards))
    )
    copies = ranks.world_size // trained.shards[0].num_shards
    distance, squared_norm = (ranks.sum(sums) / copies).tolist()
    if ranks.is_main:
        said = {"distance": distance, "grad_norm": squared_norm**0.5}
        print(json.dumps(said | {"reference_bytes": sum(rows.nbytes for rows in anchors)}))
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
