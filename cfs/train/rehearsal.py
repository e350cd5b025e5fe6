"""The forward and backward passes of a step on `meta`: what they would allocate, moment by moment.

The model's own code runs, whole, on tensors without data; a ledger follows every storage from the
operation that makes it until nothing holds it any more. So what autograd keeps, what is freed
when, and what recomputation saves is not derived anywhere but observed. Only what cannot run on
`meta` stands in: FSDP's buffers, and the choice of the attention kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from cfs.model import Decoder, ModelConfig, build_model
from cfs.model.logprobs import chunked_logprobs
from cfs.model.packed_attention import PackedBatch
from cfs.train.ledger import Ledger
from cfs.train.parallel import checkpoint_activations
from cfs.train.rounding import rounding_noise, stochastic_round
from cfs.train.stand_ins import (
    ACTIVATIONS,
    GATHERED_GRADIENTS,
    GRADIENTS,
    HEAD,
    FusedAttention,
    Sharding,
    Work,
)


def rehearse(
    config: ModelConfig, work: Work, prepare: Callable[[Decoder], Decoder] = lambda model: model
) -> Counter[str]:
    """Bytes by part at the moment when a rank holds most, its masters and states left out.

    prepare  changes what trains, before all else
    """
    model = prepare(build_model(config, device="meta")).to(work.compute)
    for block in model.layers:
        block.forward = FusedAttention().within(block.forward)
    checkpoint_activations(model, work.checkpointing)
    ledger = Ledger(model.parameters(), ACTIVATIONS)
    sharding = Sharding(model, work, ledger) if work.is_sharded else None
    part = GATHERED_GRADIENTS if work.is_sharded else GRADIENTS
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, part))
    model.norm.register_forward_hook(lambda _norm, _args, hidden: _mark_head(hidden, ledger))
    with ledger:
        for _ in range(2 if work.accumulates else 1):
            _pass(model, work, ledger, sharding)
    return ledger.peak


def rehearse_rounding(num_elements: int) -> int:
    """Bytes that the update of so many bfloat16 masters needs besides them, at most."""
    masters = torch.empty(num_elements, dtype=torch.bfloat16, device="meta")
    ledger = Ledger([masters], ACTIVATIONS)
    with ledger:
        weights, _gradient = masters.float(), masters.float()
        noise = rounding_noise(0, range(num_elements), masters.device)
        masters.copy_(stochastic_round(weights, noise))
    return ledger.peak.total()


def _pass(model: Decoder, work: Work, ledger: Ledger, sharding: Sharding | None) -> None:
    """Forward and backward of one micro-batch: `loss.micro_batch_loss`, every token a target."""
    ledger.enter(ACTIVATIONS)
    if sharding is not None:
        sharding.begin()
    input_ids = torch.zeros(1, work.num_tokens, dtype=torch.int64, device="meta")
    weights = torch.zeros(work.num_tokens, device="meta")
    logprobs = _token_logprobs(model, work, input_ids, -weights)
    if sharding is not None:
        sharding.turn()
    (-(weights * logprobs).sum()).backward()
    if sharding is not None:
        sharding.end()


def _token_logprobs(model: Decoder, work: Work, input_ids: Tensor, grad_hint: Tensor) -> Tensor:
    """The model's forward pass but for its search for the targets, which `meta` cannot do."""
    context = PackedBatch(work.lengths, input_ids.device, work.route)
    hidden, weight = model.hidden_states(input_ids, context), model.head_weight
    if work.device_type == "cpu":  # where the head computes in float32
        hidden, weight = hidden.float(), weight.float()
    hidden = hidden.flatten(0, 1).index_select(0, input_ids[0])
    return chunked_logprobs(hidden, weight, input_ids[0], grad_hint=grad_hint)


def _mark_head(hidden: Tensor, ledger: Ledger) -> None:
    """What follows the last norm is the head, until the backward pass comes back to it."""
    ledger.enter(HEAD)
    if hidden.requires_grad:
        hidden.register_hook(lambda _grad: ledger.enter(ACTIVATIONS))
