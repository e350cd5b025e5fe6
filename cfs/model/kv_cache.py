"""Keys and values of every position that decoding has passed, allocated once.

Shapes: B rows, K KV heads, S cached positions, C channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfs.model.config import ModelConfig


class KVCache:
    """A fixed number of rows that are refilled in place; rows know nothing of each other."""

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device | str,
        by_position: bool = False,
    ) -> None:
        """by_position: heads of one position side by side in memory, as the flash kernels read;
        else positions of one head. Either way `keys` and `values` are (layers, B, K, S, C)."""
        shape = [config.num_layers, num_rows, config.num_kv_heads, num_positions, config.head_dim]
        if by_position:
            shape[2], shape[3] = shape[3], shape[2]
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        if by_position:
            self.keys, self.values = self.keys.transpose(2, 3), self.values.transpose(2, 3)
        self.row_ids = torch.arange(num_rows, device=device)

    def write_prompts(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v (R, K, T, C) at positions 0..T-1 of `rows` (R,) int64."""
        num_positions = k.shape[2]
        self.keys[layer, rows, :, :num_positions] = k
        self.values[layer, rows, :, :num_positions] = v

    def append(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v (B, K, 1, C) at `positions` (B,) int64."""
        self.keys[layer][self.row_ids, :, positions] = k[:, :, 0]
        self.values[layer][self.row_ids, :, positions] = v[:, :, 0]

    def copy_row(self, source: int, target: int, num_filled: int) -> None:
        """Let row `target` hold the first `num_filled` positions of row `source`."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :num_filled] = tensor[:, source, :, :num_filled]

    def keep_first(self, num_rows: int) -> None:
        """Go on with the first `num_rows` rows; the memory stays as it is."""
        self.keys, self.values = self.keys[:, :num_rows], self.values[:, :num_rows]
        self.row_ids = self.row_ids[:num_rows]
