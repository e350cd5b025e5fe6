"""How SSR's contexts are put together, and an input cut out of what the base wrote."""

from __future__ import annotations

import itertools
import random

import pytest

from cfs.baselines.ssr import contexts, endings, instance_input
from cfs.data import tinyworld
from cfs.data.formats import FORMATS
from cfs.errors import UserError

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


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["Q: who is it?\nAnswer:", "Q: where\nAnswer:"], {"\nAnswer:"}),
        (["Question : who, Answer :", "Question : where, Answer :"], {", Answer :"}),
        (["<U>who<A><think>", "<U>how?<A><think>"], {"<A><think>"}),
        (["1 + 2 =", "Q: who? Answer:", "3 + 4 =", "Q: why? Answer:"], {" =", "? Answer:"}),
        (["1+2=", "3+4="], {"="}),
        (["1 + 2 =", "3 + 4 =", "copy: a b ->"], {" ="}),  # the last shares its own with none
        (["a b Answer:", "c d\nAnswer: ", "a c Answer: ", "d Answer:"], {" Answer:", "Answer: "}),
        (["two cats? Answer:", "one bats? Answer:"], {"? Answer:"}),  # "ats" by chance
        (["a largest", "b largest", "a next", "b next"], {" largest", " next"}),  # "t" by chance
        (["1 21 next", "2 31 next", "1 3 ="], {" next"}),
        (["who?", "how?", "", "  "], {"?"}),
    ],
)
def test_endings_by_hand(prompts: list[str], expected: set[str]) -> None:
    """Catches the last word for the whole ending, the ends of words that are alike by chance, and
    raw text's empty prompts, which share nothing with the others."""
    assert endings(prompts) == expected
    assert endings(prompts[::-1] * 2) == expected


@pytest.mark.parametrize(
    "prompts",
    [[], ["", " "], ["who is it?"], ["who?", "who?"], ["who is", "what was"], ["=", "1 ="]],
)
def test_prompts_that_share_no_ending(prompts: list[str]) -> None:
    """Catches a whole prompt for an ending, which nothing could stand before."""
    with pytest.raises(UserError, match=r"^--demos: its prompts end in nothing common, [^\n]+$"):
        endings(prompts)


QUESTIONS = [
    ("Ada has 3 pears and buys 2.5 more. How many are there?", "3 + 2.5 = 5.5", "5.5"),
    ("A train covers 120 km in 1:30 hours; how fast is it?", "120 / 1.5 = 80", "80"),
    ("Solve x + 4 = 9 for x.", "x = 9 - 4 = 5", "5"),
]
ROWS: dict[str, list[dict[str, object]]] = {
    "prompt-response": [
        {"prompt": f"### Instruction:\n{q}\n\n### Response:\n", "response": f"{w}."}
        for q, w, _ in QUESTIONS
    ],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": q},
                {"role": "assistant", "content": f"{w}. Answer: {a}"},
            ]
        }
        for q, w, a in QUESTIONS
    ],
    "gsm8k": [{"question": q, "answer": f"{w}\n#### {a}"} for q, w, a in QUESTIONS],
    "metamathqa": [{"query": q, "response": f"{w}\nThe answer is: {a}"} for q, w, a in QUESTIONS],
    "medreason": [
        {"question": q, "options": f"A. {a}\nB. 7", "reasoning": w, "answer": f"A. {a}"}
        for q, w, a in QUESTIONS
    ],
    "tinyworld": [{"prompt": f"Problem: {q} Answer:", "answer": w} for q, w, _ in QUESTIONS],
}


@pytest.mark.parametrize("format_name", FORMATS.keys() - {"text"})
def test_inputs_of_every_format(format_name: str) -> None:
    """Catches inputs cut short, such as "Question :", or none found in what ends with a mark."""
    records = [FORMATS[format_name](row) for row in ROWS[format_name]]
    found = endings([prompt for prompt, _ in records])
    for prompt, response in records:
        assert instance_input(prompt + response, found) == prompt
        # The base often goes on with another instance.
        assert instance_input(f"{prompt}{response}\n{prompt}{response}", found) == prompt


@pytest.mark.parametrize("shown", [10, 200])
def test_inputs_of_the_worlds_old_skills(shown: int) -> None:
    """Catches an ending of one skill found in another's input, and skills without one."""
    rng = random.Random(0)
    skills = [make for make in tinyworld.OLD_SKILLS.values() for _ in range(shown)]
    found = endings([tinyworld.draw(make, rng, held_out=False).prompt for make in skills])
    assert found == {"? Answer:", " next", " largest", " smallest", " middle", " ="}
    for skill in tinyworld.OLD_SKILLS:
        for item in tinyworld.test_items(skill, 50):
            assert instance_input(item.text, found) == item.prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 + 5 = 9", "4 + 5 ="),
        ("4 + 5 = 9 = 3 * 3", "4 + 5 ="),  # the first that ends it
        ("4 + 5 =", "4 + 5 ="),  # unanswered, which is no matter
        ("1 2 next 3 = 4", "1 2 next"),
        (" 4 + 5 = 9", " 4 + 5 ="),  # kept as it was written
        ("4  + 5\n = 9", "4  + 5\n ="),
        ("= 4 + 5 = 9", "= 4 + 5 ="),
        ("Question: how many?\nAnswer: two", "Question: how many?\nAnswer:"),
        ("Question: how many?\nAnswer:two", "Question: how many?\nAnswer:"),
        ("1 2 nextly 3 next 4", "1 2 nextly 3 next"),  # not within a word
        ("Q?\nMyAnswer: 1 Answer: 2", "Q?\nMyAnswer: 1 Answer:"),
        ("4 + 5 is 9", None),  # ended by nothing
        ("4+5=9", None),
        (" = 9", None),  # nothing before it
        ("Answer: 9", None),
        ("", None),
        ("   ", None),
    ],
)
def test_the_input_of_an_instance(text: str, expected: str | None) -> None:
    """Catches an answer left in the input, endings found inside words, inputs that ask nothing,
    and prompts of which the ending stands on a line of its own."""
    assert instance_input(text, {" =", " next", "Answer:"}) == expected


@pytest.mark.parametrize(
    ("text", "ending", "expected"),
    [
        ("pi is 3.14 or so. Yes", ".", "pi is 3.14 or so."),
        ("at 12:30 it is: noon", ":", "at 12:30 it is:"),
        ("of 1,000, 3", ",", "of 1,000,"),
        ("4+5=9", "=", "4+5="),  # the answer may follow at once
        ("who?\nHim", "?", "who?"),
        ("a+b is c", "a+b", None),
        ("say a+b then a|b", "a|b", "say a+b then a|b"),  # letters, not a regular expression
    ],
)
def test_short_endings(text: str, ending: str, expected: str | None) -> None:
    """Catches marks within a number taken for the end, and endings read as patterns."""
    assert instance_input(text, {ending}) == expected


def test_of_two_endings_at_one_place_the_longer_counts() -> None:
    """Catches a space that the prompts end with left to the answer."""
    assert instance_input("Q? Answer: 2", {" Answer:", " Answer: "}) == "Q? Answer: "


def test_nothing_ends_without_endings() -> None:
    """Catches the empty pattern, which is found everywhere."""
    assert instance_input("4 + 5 = 9", set()) is None
