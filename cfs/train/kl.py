"""KL(p_theta* || p_theta) in nats, estimated on samples of p_theta*."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cfs.data.formats import Example
from cfs.data.mixture import Draw
from cfs.data.packing import micro_batches
from cfs.model import Decoder
from cfs.ranks import Ranks
from cfs.train.loss import token_logprobs


@dataclass(frozen=True)
class KLEstimate:
    """A mean over samples and its standard error, in nats per sequence."""

    nats: float
    se: float


@dataclass(frozen=True)
class HeldOutSamples:
    """Samples of p_theta* that training never meets.

    reference_logprobs  (num_samples,) float64, log p_theta*(x) of each whole sequence
    """

    examples: list[Example]
    reference_logprobs: np.ndarray


def estimate_kl(
    model: Decoder, samples: HeldOutSamples, max_tokens: int, ranks: Ranks
) -> KLEstimate:
    """Mean and standard error of log p_theta*(x) - log p_theta(x) over x ~ p_theta*.

    Unbiased for KL(p_theta* || p_theta) of strings cut at the sampler's maximum length, when the
    samples come from temperature 1 and top-p 1 (section 2, the expansion of the KL). It can be
    negative, as an estimate may be. Collective: every rank takes its part of the samples.
    """
    ids, logprobs = sequence_logprobs(model, samples.examples, max_tokens, ranks)
    ratios = torch.from_numpy(samples.reference_logprobs[ids] - logprobs)
    moments = torch.stack((torch.ones_like(ratios), ratios, ratios.square())).sum(1)
    count, total, squares = ranks.sum(moments.to(ranks.device)).tolist()
    mean = total / count
    variance = max(0.0, squares - count * mean**2) / max(1.0, count - 1)
    return KLEstimate(mean, math.sqrt(variance / count))


@torch.no_grad()
def sequence_logprobs(
    model: Decoder, examples: list[Example], max_tokens: int, ranks: Ranks
) -> tuple[list[int], np.ndarray]:
    """log p_theta of all targets of each example, for this rank's part of the examples.

    max_tokens  per forward pass

    Returns the examples' places in the list and as many float64 sums in nats. Collective.
    """
    draws = [Draw(example, synthetic=True) for example in examples]
    ids: list[int] = []
    sums: list[Tensor] = []
    for batch in micro_batches(draws, max_tokens, ranks.rank, ranks.world_size):
        logprobs = token_logprobs(model, batch.to(ranks.device)).double().cpu()
        document_sums = torch.zeros(len(batch.draw_ids), dtype=torch.float64)
        sums.append(document_sums.index_add_(0, batch.document_of_target, logprobs))
        ids += batch.draw_ids
    return ids, torch.cat(sums).numpy()
