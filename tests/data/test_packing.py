"""Documents end to end in micro-batches, and the micro-batches over the ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.data.formats import Example, make_example
from cfs.data.mixture import Draw
from cfs.data.packing import MicroBatch, micro_batches, packed_batch, padded_batch


def draw(length: int, token: int = 1, first_target: int = 1, synthetic: bool = False) -> Draw:
    return Draw(make_example(np.full(length, token), first_target), synthetic)


def documents(batch: MicroBatch) -> list[list[int]]:
    return [ids.tolist() for ids in batch.input_ids[0].split(batch.lengths)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 30), st.integers(1, 31), st.booleans()), min_size=1),
    st.integers(1, 100),
    st.sampled_from([1, 2, 3, 4]),
)
def test_micro_batches_hold_each_document_once(
    rows: list[tuple[int, int, bool]], max_tokens: int, world_size: int
) -> None:
    """Catches a target lost or doubled by sorting, cutting, dealing, or a filler that counts."""
    draws = [
        draw(length, i + 1, min(first, length), synthetic)
        for i, (length, first, synthetic) in enumerate(rows)
    ]
    ranks = [micro_batches(draws, max_tokens, r, world_size) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks take equal numbers of passes"
    found: Counter[tuple[int, bool]] = Counter()
    seen_ids = []
    for batch in (b for batches in ranks for b in batches):
        assert batch.input_ids.shape == batch.target_mask.shape == (1, sum(batch.lengths))
        assert batch.num_tokens <= max_tokens or len(batch.lengths) == 1
        assert batch.lengths == sorted(batch.lengths), "equal lengths lie side by side"
        seen_ids += batch.draw_ids
        targets = batch.input_ids[batch.target_mask].tolist()
        found.update(zip(targets, batch.synthetic.tolist(), strict=True))
        if not batch.draw_ids:
            assert not targets, "a filler counts for nothing"
            continue
        expected_ids = [draws[i].example.input_ids.tolist() for i in batch.draw_ids]
        assert documents(batch) == expected_ids
        owners = [batch.draw_ids[d] for d in batch.document_of_target.tolist()]
        assert targets == [i + 1 for i in owners]
    assert sorted(seen_ids) == list(range(len(draws)))
    expected = Counter(
        {
            (i + 1, d.synthetic): d.example.num_targets
            for i, d in enumerate(draws)
            if d.example.num_targets
        }
    )
    assert found == expected


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_carry_like_loads(world_size: int) -> None:
    """Catches dealing by count, or bins filled one after the other so that the last is light."""
    generator = np.random.default_rng(0)
    draws = [draw(int(n)) for n in generator.integers(20, 400, 128)]
    ranks = [micro_batches(draws, 4096, r, world_size) for r in range(world_size)]
    total = sum(len(d.example.input_ids) for d in draws)
    smallest_number = -(-total // (4096 * world_size))
    assert len(ranks[0]) <= smallest_number + 1
    for side_by_side in zip(*ranks, strict=True):
        loads = [batch.num_tokens for batch in side_by_side]
        assert max(loads) - min(loads) < 20, "no more than the shortest document"


def test_a_document_beyond_the_budget_lies_alone() -> None:
    """Catches an endless search for a bin that holds it, and company that makes it longer."""
    draws = [draw(3), draw(50), draw(4), draw(2)]
    batches = micro_batches(draws, 10)
    assert [b.lengths for b in batches] == [[50], [2, 3, 4]]


def test_more_ranks_than_documents() -> None:
    """Catches a rank without a document, at which the others would wait forever."""
    draws = [draw(9), draw(5, token=2)]
    batches = [micro_batches(draws, 100, r, 4) for r in range(4)]
    assert [len(b) for b in batches] == [1, 1, 1, 1]
    assert [b[0].draw_ids for b in batches] == [[0], [1], [], []]
    filler = batches[3][0]
    assert documents(filler) == [[2] * 5], "the shortest there is"
    assert not filler.target_mask.any()
    assert filler.synthetic.shape == filler.document_of_target.shape == (0,)


def test_a_document_whose_first_token_is_a_target_is_a_bug() -> None:
    """Catches a target that the last token of the document before would predict."""
    wrong = Draw(Example(np.array([1, 2]), np.array([True, True])), False)
    with pytest.raises(AssertionError, match="first token"):
        packed_batch([draw(3), wrong], [0, 1])


def test_the_padded_twin_holds_the_same() -> None:
    """Catches a twin that differs in its targets, and padding that counts as one."""
    draws = [draw(5, 1, 2), draw(3, 2, 1, True), draw(4, 3, 4)]
    packed, padded = packed_batch(draws, [0, 1, 2]), padded_batch(draws, [0, 1, 2])
    assert padded.input_ids.tolist() == [[1] * 5, [2, 2, 2, 0, 0], [3, 3, 3, 3, 0]]
    assert padded.lengths == []
    assert packed.lengths == [5, 3, 4]
    for batch in (packed, padded):
        assert batch.input_ids[batch.target_mask].tolist() == [1, 1, 1, 2, 2]
        assert batch.synthetic.tolist() == [False, False, False, True, True]
        assert batch.document_of_target.tolist() == [0, 0, 0, 1, 1]
    moved = packed.to(torch.device("meta"))
    assert moved.target_mask.device.type == moved.synthetic.device.type == "meta"
