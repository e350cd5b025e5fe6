"""Stochastic rounding of weights to bfloat16, which keeps updates far below its resolution.

An update of 5e-6 to a weight of 0.02 is a tenth of half a bfloat16 step, so that rounding to
nearest would lose it every time; rounded up as often as it is far, it arrives on average. The
noise of an element is a function of its place in the whole parameter alone, so that it is the same
on any number of ranks and after a resumption.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DROPPED_BITS = 16
"""Of a float32, which a bfloat16 lacks: all of them are at the low end of the fraction."""


def stochastic_round(values: Tensor, noise: Tensor) -> Tensor:
    """Round to one of the two neighbouring bfloat16, whose mean over the noise is the value.

    values  float32
    noise   int32 of the same shape, uniform on [0, 2^16)

    Returns bfloat16. Values that bfloat16 represents stay as they are, infinities and NaN too;
    beyond the largest bfloat16 lies infinity, as for rounding to nearest.
    """
    # The pattern of a float's bits rises with its magnitude, subnormals included: a carry out of
    # the dropped bits is the next bfloat16 away from zero.
    kept = (values.view(torch.int32) + noise) >> DROPPED_BITS
    rounded = kept.to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def noise_key(seed: int, step: int, parameter: int) -> int:
    """32 random bits for one parameter's noise at one step, as an int32."""
    state = np.random.SeedSequence((seed, step, parameter)).generate_state(1)
    return int(state.view(np.int32)[0])


def rounding_noise(key: int, place: range, device: torch.device) -> Tensor:
    """Noise of the elements `place` of a parameter: (len,) int32, uniform on [0, 2^16).

    key  an int32, of `noise_key`

    A hash of the element's number, by the finaliser of MurmurHash3; int32 sums and products wrap.
    """
    bits = torch.arange(len(place), dtype=torch.int32, device=device)
    bits.add_(_as_int32(place.start)).bitwise_xor_(key)
    _mix(bits, 16).mul_(_as_int32(0x85EBCA6B))
    _mix(bits, 13).mul_(_as_int32(0xC2B2AE35))
    return _mix(bits, 16).bitwise_and_((1 << DROPPED_BITS) - 1)


def _mix(bits: Tensor, shift: int) -> Tensor:
    """bits ^= bits >> shift, with zeros shifted in; in place."""
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _as_int32(value: int) -> int:
    """The int32 that equals `value` modulo 2^32."""
    return (value + 2**31) % 2**32 - 2**31
