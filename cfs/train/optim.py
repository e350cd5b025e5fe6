"""AdamW on the rows that each rank holds, its learning rate, and weights to begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cfs.baselines import Update
from cfs.model import Decoder
from cfs.train.eightbit import (
    MIN_8BIT_ELEMENTS,
    EightBitMoments,
    bitsandbytes_functional,
    pieces,
)
from cfs.train.moments import FloatMoments
from cfs.train.parallel import LocalShard, local_part
from cfs.train.rounding import noise_key, rounding_noise, stochastic_round

EMBEDDING_STD = 0.02

CHUNK_ON_CPU, CHUNK_ON_DEVICE = 2**18, 2**23
"""Elements updated at a time, whole blocks of 8-bit moments: temporaries that fit a CPU's cache,
or kernels that take longer than their launches."""

OptimizerKind = Literal["adamw", "adamw8bit"]


def cosine_lr(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then cosine to zero.

    warmup  share of `num_steps` (section 3: 3 %); the last warm-up step is the peak
    """
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def check_optimizer(kind: OptimizerKind) -> None:
    """Raises `UserError` where the package that the optimizer needs cannot be imported."""
    if kind == "adamw8bit":
        bitsandbytes_functional()


class ShardedAdamW:
    """AdamW over the rows that this rank holds; gains of norms do not decay.

    It computes in float32. Masters in bfloat16 take their updates by stochastic rounding.
    """

    def __init__(
        self,
        shards: list[LocalShard],
        kind: OptimizerKind,
        weight_decay: float,
        beta2: float,
        seed: int,
    ) -> None:
        """The moments are float32; with "adamw8bit" they are 8 bits wide for every parameter of
        at least `MIN_8BIT_ELEMENTS`, however few of them this rank holds.

        weight_decay  decoupled
        seed          of the rounding

        Raises `UserError` where bitsandbytes is needed and cannot be imported.
        """
        dtypes = {shard.parameter.dtype for shard in shards}
        assert dtypes <= {torch.float32, torch.bfloat16}, f"masters are {dtypes}"
        self._shards = shards
        self._weight_decay, self._beta2, self._seed = weight_decay, beta2, seed
        self._moments = [
            EightBitMoments(shard)
            if kind == "adamw8bit" and shard.whole_shape.numel() >= MIN_8BIT_ELEMENTS
            else FloatMoments(shard)
            for shard in shards
        ]

    @torch.no_grad()
    def step(
        self,
        lr: float,
        step: int,
        scale: float = 1.0,
        after_update: Sequence[Callable[[Update], None]] = (),
    ) -> None:
        """Update each parameter that has a gradient, and free the gradient at once.

        step   counted from 0; decides the rounding, together with the seed
        scale  multiplies every gradient
        after_update  called after each parameter's update, and may change it; costs a float32
                      copy of one parameter's rows
        """
        for number, shard in enumerate(self._shards):
            if shard.parameter.grad is None:
                continue
            before = None
            if after_update:
                before = local_part(shard.parameter).view(-1).to(torch.float32, copy=True)
            self._update(number, lr, step, scale)
            shard.parameter.grad = None
            if before is not None:
                weights, read_mean = (
                    local_part(shard.parameter).view(-1),
                    self._moments[number].mean,
                )
                decayed = 1.0 - lr * self._decay(shard)
                update = Update(number, shard, weights, before, read_mean, decayed)
                for settle in after_update:
                    settle(update)

    def _update(self, number: int, lr: float, step: int, scale: float) -> None:
        shard, moments = self._shards[number], self._moments[number]
        assert shard.grad is not None
        # Neither is kept for the next step: FSDP may yet move a parameter's storage.
        weights, grad = local_part(shard.parameter).view(-1), shard.grad.reshape(-1)
        decay = self._decay(shard)
        is_rounded = weights.dtype == torch.bfloat16
        key = noise_key(self._seed, step, number) if is_rounded else 0
        chunk = CHUNK_ON_CPU if weights.device.type == "cpu" else CHUNK_ON_DEVICE
        moments.num_updates += 1
        for place in pieces(moments.span, chunk):
            piece = slice(place.start - moments.span.start, place.stop - moments.span.start)
            masters, gradient = weights[piece].float(), grad[piece].float()
            if scale != 1.0:
                gradient.mul_(scale)
            moments.update(masters, gradient, place, lr, decay, self._beta2)
            if is_rounded:
                noise = rounding_noise(key, place, masters.device)
                weights[piece] = stochastic_round(masters, noise)

    def _decay(self, shard: LocalShard) -> float:
        return self._weight_decay if len(shard.whole_shape) >= 2 else 0.0

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the moments themselves, not copies.

        DTensors under FSDP, which can be cut anew; the scales of 8-bit blocks are plain and go by
        shard, so that ranks with the same rows of a hybrid sharding give the same.
        """
        parts = [moments.tensors() for moments in self._moments]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def state_facts(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors; JSON-able, and alike on all ranks."""
        updates = zip(self._shards, self._moments, strict=True)
        return {
            "num_shards": self._shards[0].num_shards,
            "num_updates": {shard.name: moments.num_updates for shard, moments in updates},
        }

    def load_state(
        self, facts: dict[str, Any], read: Callable[[dict[str, Tensor]], object]
    ) -> None:
        """Go on from a checkpoint, whatever number of shards it was saved on.

        facts  of `state_facts`
        read   fills tensors in place by their names in the checkpoint. Called once; the plain
               ones among them differ between ranks

        Float32 moments come back bit for bit, and so do 8-bit blocks that both numbers of shards
        have in common; all others are quantised anew.
        """
        num_shards = facts["num_shards"]
        parts = [moments.wanted(num_shards) for moments in self._moments]
        saved = {name: tensor for part in parts for name, tensor in part.items()}
        read(saved)
        for shard, moments in zip(self._shards, self._moments, strict=True):
            moments.num_updates = facts["num_updates"][shard.name]
            moments.accept(saved, num_shards)


def init_weights(model: Decoder, seed: int) -> None:
    """Random weights for pretraining: normal, gains at one.

    Projections have deviation sqrt(2 / 5D) (arXiv 1910.05895), those into the residual stream
    less by sqrt(2 * layers), so that its variance does not grow with depth; embeddings 0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    projection_std = math.sqrt(2 / (5 * model.config.hidden_size))
    residual_std = projection_std / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.ones_(parameter)
        elif name.startswith(("embed_tokens", "lm_head")):
            nn.init.normal_(parameter, std=EMBEDDING_STD, generator=generator)
        else:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = residual_std if into_residual else projection_std
            nn.init.normal_(parameter, std=std, generator=generator)
