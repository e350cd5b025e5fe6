"""How SSR's contexts are put together, and an input cut out of what the base wrote."""

from __future__ import annotations

import itertools

import pytest

from cfs.baselines.ssr import closing_words, contexts, instance_input

SEED_ID, EOS_ID = 8, 9


def test_a_context_by_hand() -> None:
    """Catches a demonstration without its end, a context without its seed token, one demonstration
    shown twice, and always the same order."""
    found = list(contexts([[1, 2], [3]], SEED_ID, EOS_ID, 30, seed=0))
    assert len(found) == 30
    assert {tuple(ids) for ids in found} == {(8, 1, 2, 9, 3, 9), (8, 3, 9, 1, 2, 9)}


def test_every_pair_of_demonstrations_is_shown() -> None:
    """Catches demonstrations that are never drawn."""
    found = {tuple(ids) for ids in contexts([[1], [2], [3], [4]], SEED_ID, EOS_ID, 500, seed=0)}
    pairs = itertools.permutations(range(1, 5), 2)
    assert found == {(SEED_ID, one, EOS_ID, two, EOS_ID) for one, two in pairs}


def test_one_demonstration_is_shown_alone() -> None:
    """Catches a draw of two out of one."""
    assert list(contexts([[1, 2]], SEED_ID, EOS_ID, 2, seed=0)) == [[8, 1, 2, 9]] * 2


def test_contexts_are_a_function_of_the_seed() -> None:
    """Catches draws from a global generator, which a resumed run would not repeat, and seeds that
    all give one corpus."""
    demonstrations = [[i] for i in range(7)]
    drawn = [list(contexts(demonstrations, SEED_ID, EOS_ID, 50, seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0][:10] == list(contexts(demonstrations, SEED_ID, EOS_ID, 10, seed=0))


def test_closing_words_by_hand() -> None:
    """Catches the first word for the last, and an empty prompt, which ends with none."""
    prompts = ["1 + 2 =", "Q: who?\nAnswer:", "3 + 4 =", "", "  ", "copy: a b ->"]
    assert closing_words(prompts) == {"=", "Answer:", "->"}
    assert closing_words([]) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 + 5 = 9", "4 + 5 ="),
        ("4 + 5 = 9 = 3 * 3", "4 + 5 ="),  # the first that closes
        ("4 + 5 =", "4 + 5 ="),  # unanswered, which is no matter
        ("copy: b c -> b = c", "copy: b c ->"),
        (" 4 + 5 = 9", " 4 + 5 ="),  # kept as it was written
        ("4  + 5\n = 9", "4  + 5\n ="),
        ("Question: how many?\nAnswer: two", "Question: how many?\nAnswer:"),
        ("4 + 5 is 9", None),  # closed by no word
        ("4+5=9", None),  # nor by part of one
        ("= 9", None),  # nothing before it
        (" = 9", None),
        ("= 4 + 5 = 9", None),
        ("", None),
        ("   ", None),
    ],
)
def test_the_input_of_an_instance(text: str, expected: str | None) -> None:
    """Catches an answer left in the input, words found inside others, inputs that ask nothing, and
    prompts of which the closing word stands on a line of its own."""
    assert instance_input(text, {"=", "->", "Answer:"}) == expected


def test_nothing_closes_without_closing_words() -> None:
    """Catches raw text, whose demonstrations have no prompt, taken for an input."""
    assert instance_input("4 + 5 = 9", set()) is None
