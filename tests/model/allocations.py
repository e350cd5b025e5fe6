"""What operations allocate, counted as they are dispatched."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation under it made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        sizes = [x.untyped_storage().nbytes() for x in made if isinstance(x, Tensor)]
        self.num_bytes = max(self.num_bytes, *sizes, 0)
        return result
