"""The order of examples is a function of (seed, step)."""

from __future__ import annotations

from collections import Counter

from cfs.data.formats import Example, make_example
from cfs.data.mixture import Draw, Mixture, Source


def example(length: int, tag: int, first_target: int = 1) -> Example:
    return make_example([0] + [tag] * (length - 1), first_target)


def mixture_of(task: list[Example], synthetic: list[Example], size: int, seed: int) -> Mixture:
    sources = [Source("record", task), Source("sample", synthetic, synthetic=True)]
    return Mixture(sources, size, seed)


def tags(draws: list[Draw]) -> list[int]:
    return [int(d.example.input_ids[1]) for d in draws]


def test_every_epoch_meets_every_example_once() -> None:
    """Catches an epoch that skips or repeats, also where it ends inside a batch."""
    mixture = mixture_of(
        [example(4, i) for i in range(7)], [example(4, i) for i in range(7, 12)], 5, 0
    )
    seen = [tag for step in range(12) for tag in tags(mixture.batch(step))]
    for epoch in range(5):
        assert sorted(seen[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert seen[:12] != seen[12:24], "epochs are shuffled anew"


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    """Catches an order that depends on which steps were asked for before (resume)."""
    task = [example(4, i) for i in range(50)]
    one, other = mixture_of(task, [], 8, 3), mixture_of(task, [], 8, 3)
    forward = [tags(one.batch(step)) for step in range(20)]
    backward = [tags(other.batch(step)) for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [tags(mixture_of(task, [], 8, 4).batch(step)) for step in range(20)]


def test_sources_are_told_apart() -> None:
    """Catches synthetic samples counted as task examples."""
    mixture = mixture_of([example(4, 1)] * 30, [example(4, 2)] * 60, 90, 0)
    assert Counter((d.synthetic, int(d.example.input_ids[1])) for d in mixture.batch(0)) == {
        (False, 1): 30,
        (True, 2): 60,
    }


def test_interleaved_sources_keep_their_shares_and_waste_no_example() -> None:
    """Catches a weight that is ignored, and a small source whose tail is never met."""
    small, large = [example(4, i) for i in range(10)], [example(4, i) for i in range(10, 110)]
    sources = [Source("a", small, per_epoch=30), Source("b", large, per_epoch=70)]
    mixture = Mixture(sources, 50, 0)
    assert len(mixture) == 100
    for epoch in range(3):
        draws = mixture.batch(2 * epoch) + mixture.batch(2 * epoch + 1)
        counts = Counter(d.source for d in draws)
        assert counts == {"a": 30, "b": 70}
        assert Counter(tags([d for d in draws if d.source == "a"])) == dict.fromkeys(range(10), 3)
    met = Counter(tag for step in range(20) for tag in tags(mixture.batch(step)) if tag >= 10)
    assert met == dict.fromkeys(range(10, 110), 7), "ten epochs of 70 draws are seven passes"


def test_a_draw_is_named_by_what_a_person_finds_it_by() -> None:
    """Catches a batch that cannot be traced back to the file it came from."""
    named = [make_example([0, 1], 1, number) for number in (3, 7)]
    draws = Mixture([Source("train.jsonl record", named)], 2, 0).batch(0)
    assert {d.id for d in draws} == {"train.jsonl record 3", "train.jsonl record 7"}
