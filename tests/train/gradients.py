"""Gradients of one batch in every way that training computes them, and the plain way.

torchrun --nproc-per-node 2 -m tests.train.gradients FILE
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from cfs import ranks as process_ranks
from cfs.cli import run
from cfs.data.formats import make_example
from cfs.data.mixture import Draw
from cfs.data.packing import MicroBatch, micro_batches, padded_batch
from cfs.model import Decoder
from cfs.ranks import Ranks
from cfs.train.loss import SourceWeights, TargetCounts, micro_batch_loss
from cfs.train.parallel import Checkpointing, checkpoint_activations, full_parameters, shard
from tests.conftest import ALONE, tiny_model

LAM = 0.7
CUTS = (1, 30, 10_000)
"""Tokens of a micro-batch: every document alone, uneven cuts, all in one."""
KINDS: tuple[Checkpointing, ...] = ("none", "selective", "block")

Normalize = Literal["pooled", "source"]


def batch_of_eight() -> list[Draw]:
    """Unequal lengths and masks, two of one length, both sources, one without any target."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(5, 1), (9, 4), (12, 12), (3, 2), (20, 1), (7, 6), (16, 1), (9, 8)]
    return [
        Draw(
            make_example(
                [0, *torch.randint(1, 97, (length - 1,), generator=generator).tolist()],
                first_target,
            ),
            synthetic=first_target == 1,
        )
        for length, first_target in shapes
    ]


def batch_of_seven() -> list[Draw]:
    """As many documents as leave a rank without one, where each lies alone."""
    return batch_of_eight()[:7]


def plain_gradients(
    model: Decoder, draws: list[Draw], normalize: Normalize = "pooled"
) -> dict[str, Tensor]:
    """The oracle: the objective (below eq. 2) of the whole padded batch, over its full logits."""
    batch = padded_batch(draws, list(range(len(draws))))
    logprobs = model(batch.input_ids)[:, :-1].log_softmax(-1)
    nll = -logprobs.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    is_target = batch.target_mask[:, 1:]
    synthetic = is_target & torch.tensor([draw.synthetic for draw in draws])[:, None]
    task = is_target & ~synthetic
    if normalize == "pooled":
        loss = (nll[task].sum() + LAM * nll[synthetic].sum()) / is_target.sum()
    else:
        loss = nll[task].mean() + LAM * nll[synthetic].mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients(
    model: Decoder,
    draws: list[Draw],
    batches: list[MicroBatch],
    normalize: Normalize = "pooled",
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Accumulated as the loop accumulates them, whole, by name; they overwrite the parameters.

    batches  this rank's part of `draws`
    """
    weights = SourceWeights.of(TargetCounts.of(draws), LAM, normalize)
    model.zero_grad()
    for batch in batches:
        micro_batch_loss(model, batch, weights, scale=ranks.world_size).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    return {name: value.clone() for name, value in full_parameters(model)}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference by norm, over all parameters together."""
    assert ours.keys() == theirs.keys()
    squares = [
        torch.stack([(ours[k].double() - b).square().sum(), b.square().sum()])
        for k, b in ((k, theirs[k].double()) for k in ours)
    ]
    difference, norm = torch.stack(squares).sum(0).sqrt().tolist()
    return difference / norm


def worst_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The same of the parameter where it is largest."""
    return max(relative_difference({k: ours[k]}, {k: theirs[k]}) for k in theirs)


def sharded_cases(ranks: Ranks) -> Iterator[tuple[tuple[bool, Checkpointing, int], dict]]:
    """Gradients over `ranks` by (tied, activation checkpointing, tokens of a micro-batch)."""
    draws = batch_of_seven()
    for tied, kind, cut in product((False, True), KINDS, CUTS):
        model = tiny_model("llama", tie_word_embeddings=tied)
        checkpoint_activations(model, kind)
        shard(model, ranks, torch.float32)
        batches = micro_batches(draws, cut, ranks.rank, ranks.world_size)
        yield (tied, kind, cut), gradients(model, draws, batches, ranks=ranks)


def main() -> None:
    group = process_ranks.start("cpu")
    cases = dict(sharded_cases(group))
    if group.is_main:
        torch.save(cases, sys.argv[1])
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
