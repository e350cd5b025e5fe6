"""The diagonal of the Fisher information of p_theta*, estimated on its own context-free samples."""

from __future__ import annotations

import torch
from torch import Tensor

from cfs.baselines.ewc import GROUP_SIZE, add_squares
from cfs.data.formats import Example
from cfs.data.mixture import Draw
from cfs.data.packing import micro_batches
from cfs.model import Decoder
from cfs.progress import Bar
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.loss import SourceWeights, micro_batch_loss
from cfs.train.parallel import LocalShard


def fisher_information(
    model: Decoder,
    shards: list[LocalShard],
    samples: list[Example],
    config: TrainConfig,
    ranks: Ranks,
) -> list[Tensor]:
    """E_{x ~ p_theta*}[(d/d theta_i log p(x))^2] of whole sequences, this rank's rows, float32.

    model    with the weights of theta*
    samples  of p_theta* at temperature 1 and top-p 1, every token after the seed a target; they
             are taken in groups of `GROUP_SIZE`, whatever the number of ranks

    Collective. Leaves no gradients behind. Source: `baselines/ewc.py`.
    """
    fisher = [torch.zeros_like(shard.local, dtype=torch.float32) for shard in shards]
    groups = [samples[i : i + GROUP_SIZE] for i in range(0, len(samples), GROUP_SIZE)]
    each_target = SourceWeights(1.0, 1.0)  # a sum over the group's targets, not a mean
    with Bar("Fisher information", len(groups), enabled=ranks.is_main) as bar:
        for group in groups:
            draws = [Draw(example, synthetic=True) for example in group]
            for batch in micro_batches(
                draws, config.micro_batch_tokens, ranks.rank, ranks.world_size
            ):
                batch = batch.to(ranks.device)
                micro_batch_loss(model, batch, each_target, ranks.world_size).loss.backward()
            add_squares(fisher, shards, len(samples))
            bar.advance(1)
    return fisher
