"""Memory of tensors counted as it is taken and let go, on any device: on `meta` it is only counted.

Temporaries inside of a kernel, and storages that are resized in place, are not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the one door, which torch's docs name
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Bytes of the live tensors that operations within the block have made, by part."""

    def __init__(self, ignored: Iterable[Tensor], first: str) -> None:
        """ignored  tensors that are there already and count elsewhere; views of them are free
        first    part to begin with
        """
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._part = first
        self._ignored = [tensor.untyped_storage() for tensor in ignored]
        self._ignored_ids = set(map(id, self._ignored))
        self._entries: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == torch.ops.aten.equal.default and args[0].is_meta:
            return True  # nothing to compare: the caller gets what it hopes for
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def enter(self, part: str) -> None:
        """What is made from now on belongs to `part`."""
        self._part = part

    def move(self, tensor: Tensor, part: str) -> None:
        """Let `part` answer for a tensor that was made under another name."""
        key = id(tensor.untyped_storage())
        reference, old, num_bytes = self._entries[key]
        self._entries[key] = reference, part, num_bytes
        self.live[old] -= num_bytes
        self.live[part] += num_bytes

    def allocate(self, part: str, num_elements: int, dtype: torch.dtype) -> Tensor:
        """A tensor of that size, which lives until it is let go."""
        outer, self._part = self._part, part
        tensor = torch.empty(num_elements, dtype=dtype, device="meta")
        self._part = outer
        return tensor

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._entries or key in self._ignored_ids or num_bytes == 0:
            return
        self._entries[key] = (
            weakref.ref(storage, lambda _: self._forget(key)),
            self._part,
            num_bytes,
        )
        self.live[self._part] += num_bytes
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _forget(self, key: int) -> None:
        _, part, num_bytes = self._entries.pop(key)
        self.live[part] -= num_bytes
