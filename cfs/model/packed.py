"""Weights laid out for the processor's matrix kernels, once, for the thousands of decode steps.

A float32 product with few rows spends much of its time on rearranging the weight for the kernel.
oneDNN can keep that arrangement. `bench/sampler.py --only step` times the products so packed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfs.model.decoder import Decoder


class PackedLinear(nn.Module):
    """`nn.Linear` without bias whose weight lies in oneDNN's own order; inference only."""

    def __init__(self, weight: Tensor, num_rows: int) -> None:
        """weight (out, in); num_rows that the products will mostly have: any number works."""
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), same dtype."""
        y = torch.ops.mkldnn._linear_pointwise(
            x.reshape(-1, x.shape[-1]), self.packed, None, "none", [], ""
        )
        return y.view(*x.shape[:-1], -1)


def packed_for_decoding(model: Decoder, num_rows: int) -> Decoder:
    """A copy of the model with packed weights; the model itself where packing brings nothing.

    num_rows  texts in progress. Costs the memory of the weights once more.
    """
    if not can_pack(model.embed_tokens.weight):
        return model
    with torch.device("meta"):
        packed = type(model)(model.config)
    packed.load_state_dict(model.state_dict(), assign=True)
    head = PackedLinear(model.head_weight, num_rows)
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not packed.lm_head:
                setattr(module, name, PackedLinear(child.weight, num_rows))
    packed.logits = head.forward  # type: ignore[method-assign]
    return packed.eval()


def can_pack(weight: Tensor) -> bool:
    """Does this torch have the packed product for this dtype and device, and does it work?"""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        probe = torch.eye(16, dtype=weight.dtype)
        return torch.equal(PackedLinear(probe, 4)(probe[:4]), F.linear(probe[:4], probe))
    except (AttributeError, RuntimeError):
        return False
