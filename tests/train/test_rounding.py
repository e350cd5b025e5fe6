"""Stochastic rounding to bfloat16, and the noise it takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cfs.train.rounding import noise_key, rounding_noise, stochastic_round

CPU = torch.device("cpu")


def all_bfloat16() -> Tensor:
    return torch.arange(2**16).to(torch.int16).view(torch.bfloat16)


def murmur(value: int) -> int:
    value ^= value >> 16
    value = value * 0x85EBCA6B % 2**32
    value ^= value >> 13
    value = value * 0xC2B2AE35 % 2**32
    return value ^ value >> 16


def test_what_bfloat16_represents_stays() -> None:
    """Catches noise that moves exact values, signs lost, and infinities that turn into NaN."""
    values = all_bfloat16()
    for noise in (0, 2**16 - 1):
        rounded = stochastic_round(values.float(), torch.full((2**16,), noise, dtype=torch.int32))
        is_nan = values.isnan()
        assert torch.equal(rounded.isnan(), is_nan)
        assert torch.equal(rounded.view(torch.int16)[~is_nan], values.view(torch.int16)[~is_nan])


def test_the_mean_over_all_noise_is_the_value() -> None:
    """Catches a bias by one part in 2^16, of negative and subnormal values too."""
    noise = torch.arange(2**16, dtype=torch.int32)
    for value in (0.02, -0.02, 1 / 3, -1e20, 3e-39, -2e-40, 1.9999999, 1e-45):
        exact = torch.tensor(value, dtype=torch.float32)
        rounded = stochastic_round(exact.expand(2**16), noise)
        assert float(rounded.double().mean()) == float(exact.double()), value


def test_only_neighbours_are_reached() -> None:
    """Catches a carry that goes more than one step away."""
    values = torch.randn(10_000) * torch.randn(10_000).mul(5).exp()
    low = stochastic_round(values, torch.zeros(10_000, dtype=torch.int32))
    high = stochastic_round(values, torch.full((10_000,), 2**16 - 1, dtype=torch.int32))
    assert (low.float().abs() <= values.abs()).all()
    assert (high.float().abs() >= values.abs()).all()
    assert (high.view(torch.int16) - low.view(torch.int16)).max() <= 1


def test_the_mean_over_seeds_is_the_value() -> None:
    """Catches noise that is not uniform: every element's mean lies within its standard error."""
    num_seeds, num_values = 2000, 500
    values = torch.randn(num_values) * 0.02
    rounded = [
        stochastic_round(values, rounding_noise(noise_key(seed, 3, 1), range(num_values), CPU))
        for seed in range(num_seeds)
    ]
    means = torch.stack(rounded).double().mean(0)
    low = stochastic_round(values, torch.zeros(num_values, dtype=torch.int32)).double()
    high = (low.to(torch.bfloat16).view(torch.int16) + 1).view(torch.bfloat16).double()
    share = ((values.double() - low) / (high - low)).clamp(0, 1)
    standard_error = (high - low).abs() * (share * (1 - share) / num_seeds).sqrt()
    is_inside = (share * num_seeds > 20) & ((1 - share) * num_seeds > 20)
    z = ((means - values.double()) / standard_error)[is_inside]
    assert z.abs().max() < 4.5
    assert float(z.square().mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / len(z)))


def test_noise_is_murmurs_hash_of_the_elements_number() -> None:
    """Catches sums and products that do not wrap, and shifts that carry the sign along."""
    key = noise_key(1, 2, 3)
    for first in (0, 65_537, 2**31 - 3, 2**32 - 2, 2**33 + 5):
        noise = rounding_noise(key, range(first, first + 6), CPU)
        expected = [murmur((number ^ key) % 2**32) % 2**16 for number in range(first, first + 6)]
        assert noise.tolist() == expected


def test_noise_of_neighbours_steps_and_parameters_is_unrelated() -> None:
    """Catches a hash without avalanche, and keys that leave a part of their input out."""
    num = 2**18
    place = range(1_000_003, 1_000_003 + num)
    keys = [noise_key(*of) for of in ((0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (1, 0, 0))]
    noises = [rounding_noise(key, place, CPU).double() for key in keys]
    noises += [noises[0].roll(shift) for shift in (1, 2, 256, 4096)]
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert correlations.abs().max() < 5 / math.sqrt(num)
    counts = torch.bincount(noises[0].long() // 256, minlength=256).double()
    chi_squared = float(((counts - num / 256) ** 2 / (num / 256)).sum())
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)
