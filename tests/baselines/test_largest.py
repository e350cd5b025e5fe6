"""The k-th largest magnitude, against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfs.baselines.largest import kth_largest
from tests.baselines.lockstep import Total, in_lockstep

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 1e-45, -3e38])
VALUES = st.lists(FINITE, min_size=1, max_size=40) | st.lists(TIED, min_size=1, max_size=40)


def alone(values: Tensor) -> Tensor:
    return values


def sorted_magnitudes(values: Tensor) -> Tensor:
    return values.float().abs().flatten().sort(descending=True).values


@settings(deadline=None)
@given(VALUES)
def test_every_k_gives_what_a_sort_gives(values: list[float]) -> None:
    """Catches a wrong half of the pattern, ties, zeros of both signs, subnormals, and k at its
    ends."""
    tensor = torch.tensor(values)
    ks = list(range(1, len(values) + 1))
    found = kth_largest([[tensor]] * len(ks), ks, alone)
    assert torch.equal(found, sorted_magnitudes(tensor))


@settings(deadline=None)
@given(VALUES, st.data())
def test_ranks_find_it_however_the_elements_are_dealt_out(
    values: list[float], data: st.DataObject
) -> None:
    """Catches a place within a bin that is counted on one rank alone, and a rank with nothing."""
    tensor = torch.tensor(values)
    k = data.draw(st.integers(1, len(values)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), min_size=2, max_size=2)))
    parts = tensor.tensor_split(cuts)

    def work(rank: int, total: Total) -> Tensor:
        return kth_largest([[parts[rank]]], [k], total)

    expected = sorted_magnitudes(tensor)[k - 1 : k]
    assert all(torch.equal(found, expected) for found in in_lockstep(3, work))


def test_a_threshold_keeps_k_elements_and_ties() -> None:
    """Catches `>` for `>=`, and a threshold that is rounded."""
    values = torch.randn(300, 700)
    (threshold,) = kth_largest([[values]], [1000], alone)
    assert int((values.abs() >= threshold).sum()) == 1000
    (threshold,) = kth_largest([[torch.tensor([3.0, -2.0, 2.0, 1.0])]], [2], alone)
    assert float(threshold) == 2.0


def test_groups_have_places_of_their_own_and_any_number_of_tensors() -> None:
    """Catches groups counted together, k = 0, an empty tensor, and one larger than a piece."""
    large = torch.randn(2**20 + 3)
    groups = [
        [torch.tensor([[1.0, -4.0]]), torch.empty(0, 7), torch.tensor(9.0)],
        [large],
        [torch.tensor([5.0])],
        [torch.empty(0)],
    ]
    found = kth_largest(groups, [2, 777, 0, 0], alone)
    assert found.tolist() == [4.0, float(sorted_magnitudes(large)[776]), torch.inf, torch.inf]


def test_bfloat16_is_read_as_it_is() -> None:
    """Catches a pattern of 16 bits taken for one of 32."""
    values = torch.randn(1000).bfloat16()
    found = kth_largest([[values]], [100], alone)
    assert found.dtype == torch.float32
    assert torch.equal(found, sorted_magnitudes(values)[99:100])


@pytest.mark.parametrize("k", [-1, 4])
def test_a_place_that_does_not_exist_is_a_bug(k: int) -> None:
    """Catches a bin read from beyond the counts."""
    with pytest.raises(AssertionError, match="k is"):
        kth_largest([[torch.ones(3)]], [k], alone)


def test_what_can_be_read_only_once_is_a_bug() -> None:
    """Catches a generator, whose second reading finds nothing."""
    with pytest.raises(AssertionError, match="twice"):
        kth_largest([iter([torch.ones(3)])], [1], alone)
