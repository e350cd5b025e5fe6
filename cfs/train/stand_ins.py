"""What stands in, in a rehearsal on `meta`, for what cannot run there: FSDP and the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cfs.model import Decoder
from cfs.model.attention import Route
from cfs.train.ledger import Ledger
from cfs.train.parallel import Checkpointing, shard_rows

GATHERED_WEIGHTS = "gathered weights"
GRADIENTS = "gradients"
GATHERED_GRADIENTS = "gathered gradients"
ACTIVATIONS = "activations"
HEAD = "head"


@dataclass(frozen=True)
class Work:
    """What one rank does between two optimizer steps.

    num_tokens  of a micro-batch, in documents of `document_tokens`; all are targets
    accumulates  more than one micro-batch comes before the step
    num_shards  ranks that hold one copy of the model; `num_ranks` is a multiple of it
    """

    num_tokens: int
    document_tokens: int
    accumulates: bool
    compute: torch.dtype
    masters: torch.dtype
    num_ranks: int
    num_shards: int
    device_type: str
    checkpointing: Checkpointing

    @property
    def is_sharded(self) -> bool:
        """Does `parallel.shard` apply FSDP?"""
        return self.num_ranks > 1 or self.compute != self.masters

    @property
    def lengths(self) -> list[int]:
        """Of the documents."""
        whole, rest = divmod(self.num_tokens, self.document_tokens)
        return [self.document_tokens] * whole + [rest] * (rest > 0)

    @property
    def route(self) -> Route:
        """An attention kernel that keeps what the device's own does."""
        is_half = self.compute.itemsize < torch.float32.itemsize
        return "varlen" if self.device_type == "cuda" and is_half else "sdpa"


class FusedAttention(TorchFunctionMode):
    """Attention keeps what fused kernels keep: on `meta` torch falls back to plain products, and
    would keep their T x T weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, True)[0]
        return func(*args, **(kwargs or {}))

    def within(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, in the backward pass's repetition too, which no mode reaches."""

        def fused(*args: Any) -> Tensor:
            with self:
                return forward(*args)

        return fused


@dataclass
class _Group:
    """What FSDP holds for one module that it shards; None where it holds nothing."""

    parameters: list[nn.Parameter]
    num_padded: int
    """Elements of all shards together, each with as many rows as the first."""
    trained: list[nn.Parameter]
    """Those that get gradients."""
    num_trained: int
    """Their elements, counted likewise."""
    arriving: Tensor | None = None
    weights: Tensor | None = None
    gradients: Tensor | None = None
    reduced: Tensor | None = None


class Sharding:
    """The buffers that FSDP2 allocates for blocks and root, at the moments when it does.

    Source: torch.distributed.fsdp._fully_shard, `_fsdp_param_group.py` and `_fsdp_collectives.py`.
    A block is gathered before its forward pass, let go after it, and gathered again for the
    backward pass while the block behind it is still at work. The root (embedding, last norm,
    head) stays gathered from forward to backward, and its gradients are reduced at the end.
    """

    def __init__(self, model: Decoder, work: Work, ledger: Ledger) -> None:
        self.work, self.ledger = work, ledger
        self.blocks = [self._group(list(block.parameters())) for block in model.layers]
        in_blocks = {id(p) for block in self.blocks for p in block.parameters}
        self.root = self._group([p for p in model.parameters() if id(p) not in in_blocks])
        self.sent: Tensor | None = None
        """What came from the ranks last in the forward pass; freed after the next."""
        self.reducing: Tensor | None = None
        """Gradients on their way to the ranks; freed before the next ones."""
        self.late: list[int] = []
        """Blocks whose input gets no gradient, so that theirs are reduced when the pass ends."""
        for number, block in enumerate(model.layers):
            block.register_forward_pre_hook(partial(self._enter, number))
            block.register_forward_hook(partial(self._leave, number))
        model.norm.register_forward_pre_hook(partial(self._enter, len(self.blocks)))

    def begin(self) -> None:
        """Before the forward pass."""
        self._gather_now(self.root)

    def turn(self) -> None:
        """Between the passes: the last block is gathered while the head goes backward."""
        self.sent = None
        self._gather(self.blocks[-1])

    def end(self) -> None:
        """After the backward pass."""
        for number in self.late:
            self._reduce(self.blocks[number])
        self.late.clear()
        self._reduce(self.root)
        self.reducing = None
        for group in (*self.blocks, self.root):
            group.reduced = None

    def _enter(self, number: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the forward pass of block `number` or, behind the last block, of the norm."""
        if number < len(self.blocks):
            self._gather_now(self.blocks[number])
        if args[0].requires_grad:
            args[0].register_hook(partial(self._backward_between, number))
        elif number < len(self.blocks):
            self.late.append(number)

    def _leave(self, number: int, *_: object) -> None:
        """After the forward pass of block `number`."""
        self.blocks[number].weights = None

    def _backward_between(self, number: int, _grad: Tensor) -> None:
        """The backward pass has come out of block `number` and goes into the one before it."""
        if number < len(self.blocks):
            self._reduce(self.blocks[number])
        if number > 0:
            self._arrive(self.blocks[number - 1])
        if number > 1:
            self._gather(self.blocks[number - 2])

    def _gather_now(self, group: _Group) -> None:
        """In the forward pass, where what was sent lies beside the next until that is there."""
        self._gather(group)
        self.sent = None
        self.sent = self._arrive(group)

    def _gather(self, group: _Group) -> None:
        """Order a group's weights from all ranks."""
        if self.work.num_shards == 1:
            return
        if self.work.compute != self.work.masters:
            num_own = group.num_padded // self.work.num_shards
            _own = self._new(GATHERED_WEIGHTS, num_own, self.work.compute)
        group.arriving = self._new(GATHERED_WEIGHTS, group.num_padded, self.work.compute)
        self._gloo_copy(GATHERED_WEIGHTS, group.num_padded, self.work.compute)

    def _arrive(self, group: _Group) -> Tensor | None:
        """Copy what the ranks sent into place; returns what they sent."""
        if self.work.num_shards == 1 and self.work.compute != self.work.masters:
            largest = max(p.numel() for p in group.parameters)
            _own = self._new(GATHERED_WEIGHTS, largest, self.work.compute)
        group.weights = self._new(GATHERED_WEIGHTS, group.num_padded, self.work.compute)
        sent, group.arriving = group.arriving, None
        return sent

    def _reduce(self, group: _Group) -> None:
        """Add a group's gradients up over the ranks, and keep this rank's rows."""
        num_shards, num_own = self.work.num_shards, group.num_trained // self.work.num_shards
        group.weights = self.reducing = None
        if not group.trained:
            return
        # A variable of torch's `foreach_reduce` holds the last one until it returns.
        _last = group.trained[-1].grad if num_shards > 1 else None
        self.reducing = self._new(GATHERED_GRADIENTS, group.num_trained, torch.float32)
        self._pad_and_cast(group)
        for parameter in group.trained:
            parameter.grad = None
        reduced = self._new(GATHERED_GRADIENTS, num_own, torch.float32)
        if num_shards > 1:
            self._gloo_copy(GATHERED_GRADIENTS, group.num_trained, torch.float32)
        if num_shards < self.work.num_ranks:
            group.reduced = reduced  # until the pass ends, as the sum over copies may still run
        if self.work.masters != torch.float32:
            reduced = self._new(GATHERED_GRADIENTS, num_own, self.work.masters)
        if group.gradients is None:
            group.gradients = reduced
            self.ledger.move(reduced, GRADIENTS)

    def _pad_and_cast(self, group: _Group) -> None:
        """What CUDA does in one kernel on the way to the reduction takes copies on a CPU."""
        if self.work.device_type != "cpu":
            return
        num_shards, dtype = self.work.num_shards, self.work.compute
        uneven = [p for p in group.trained if len(p) % num_shards]
        _padded = self._new(GATHERED_GRADIENTS, self._num_padded(uneven), dtype)
        if dtype != torch.float32:  # one after the other
            largest = max(self._num_padded([p]) for p in group.trained)
            self._new(GATHERED_GRADIENTS, largest, dtype)

    def _group(self, parameters: list[nn.Parameter]) -> _Group:
        trained = [p for p in parameters if p.requires_grad]
        return _Group(parameters, self._num_padded(parameters), trained, self._num_padded(trained))

    def _num_padded(self, parameters: list[nn.Parameter]) -> int:
        n = self.work.num_shards
        return sum(n * shard_rows(len(p), 0, n).stop * p[0].numel() for p in parameters)

    def _new(self, part: str, num_elements: int, dtype: torch.dtype) -> Tensor:
        return self.ledger.allocate(part, num_elements, dtype)

    def _gloo_copy(self, part: str, num_elements: int, dtype: torch.dtype) -> None:
        """On a CPU the ranks talk over gloo, which works in a copy."""
        if self.work.device_type == "cpu":
            self._new(part, num_elements, dtype)
