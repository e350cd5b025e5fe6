"""Micro-batches lose nothing, hold their budget and load ranks alike."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cfs.data.formats import make_example
from cfs.data.mixture import Draw
from cfs.data.packing import MicroBatch, micro_batches, packed_batch, padded_batch


def draws_of(rows: list[tuple[int, int, bool]]) -> list[Draw]:
    """Document i is the seed token and then nothing but token i + 1."""
    return [
        Draw(make_example([0] + [i + 1] * (length - 1), min(first, length)), synthetic)
        for i, (length, first, synthetic) in enumerate(rows)
    ]


def all_ranks(draws: list[Draw], max_tokens: int, world_size: int) -> list[list[MicroBatch]]:
    return [micro_batches(draws, max_tokens, rank, world_size) for rank in range(world_size)]


ROWS = st.lists(st.tuples(st.integers(2, 30), st.integers(1, 31), st.booleans()), min_size=1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ROWS, st.integers(1, 100), st.sampled_from([1, 2, 3, 4]))
def test_every_document_is_there_once(
    rows: list[tuple[int, int, bool]], max_tokens: int, world_size: int
) -> None:
    """Catches a target lost or doubled by sorting, cutting, dealing, or a filler that counts."""
    draws = draws_of(rows)
    ranks = all_ranks(draws, max_tokens, world_size)
    assert len({len(batches) for batches in ranks}) == 1, "ranks take equal numbers of passes"
    seen: list[int] = []
    for batch in (b for batches in ranks for b in batches):
        assert batch.num_tokens <= max_tokens or len(batch.lengths) == 1
        assert batch.num_tokens == sum(batch.lengths), "no padding"
        seen += batch.draw_ids
        if not batch.draw_ids:
            assert not batch.target_mask.any()
            continue
        pieces = zip(
            batch.draw_ids,
            batch.input_ids[0].split(batch.lengths),
            batch.target_mask[0].split(batch.lengths),
            strict=True,
        )
        for i, ids, mask in pieces:
            assert np.array_equal(ids, draws[i].example.input_ids)
            assert np.array_equal(mask, draws[i].example.target_mask)
        of_target = [draws[batch.draw_ids[d]] for d in batch.document_of_target.tolist()]
        assert batch.synthetic.tolist() == [draw.synthetic for draw in of_target]
    assert sorted(seen) == list(range(len(draws)))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_carry_like_loads(world_size: int) -> None:
    """Catches a rank that others wait for, and more passes than the tokens need."""
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 256).clip(8, 512).astype(int)
    draws = draws_of([(int(n), 1, False) for n in lengths])
    ranks = all_ranks(draws, 4096, world_size)
    fewest = -(-int(lengths.sum()) // (4096 * world_size))
    assert len(ranks[0]) <= fewest + 1
    for passes in zip(*ranks, strict=True):
        loads = [batch.num_tokens for batch in passes]
        assert max(loads) - min(loads) <= 0.02 * max(loads)


def test_a_batch_is_cut_the_same_way_each_time() -> None:
    """Catches an order that depends on hashing or on what came before."""
    draws = draws_of([(5 + i % 7, 2, i % 2 == 0) for i in range(40)])
    one, two = (all_ranks(draws, 50, 2) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert [x.draw_ids for x in a] == [y.draw_ids for y in b]


def test_the_padded_twin_holds_the_same_targets() -> None:
    """Catches an oracle that is wrong itself."""
    draws = draws_of([(5, 1, True), (9, 4, False), (3, 3, False)])
    packed, padded = packed_batch(draws, [0, 1, 2]), padded_batch(draws, [0, 1, 2])
    for batch in (packed, padded):
        targets = batch.input_ids[batch.target_mask].tolist()
        assert Counter(targets) == {1: 4, 2: 5}
        assert batch.document_of_target.tolist() == [0] * 4 + [1] * 5
    assert padded.input_ids.shape == (3, 9)
    assert torch.equal(packed.synthetic, padded.synthetic)


def test_a_target_that_nothing_predicts_is_refused() -> None:
    """Catches a shift by one that takes a token for its neighbour's continuation."""
    bad = Draw(make_example([3, 4, 5], first_target=0), False)
    with pytest.raises(AssertionError, match="nothing predicts"):
        packed_batch([bad, bad], [0, 1])


def test_a_document_beyond_the_budget_lies_alone() -> None:
    """Catches an endless search for a bin that holds it, and company that makes it longer."""
    draws = draws_of([(length, 1, False) for length in (3, 50, 4, 2)])
    assert [batch.lengths for batch in micro_batches(draws, 10)] == [[50], [2, 3, 4]]


def test_a_rank_without_a_document_takes_part() -> None:
    """Catches a rank that the others' collectives wait for."""
    draws = draws_of([(9, 1, False), (5, 1, True)])
    (one,), (two,), (three,), (four,) = all_ranks(draws, 100, 4)
    assert [b.draw_ids for b in (one, two, three, four)] == [[0], [1], [], []]
    assert four.lengths == [5], "the shortest there is"
    assert four.synthetic.shape == four.document_of_target.shape == (0,)
