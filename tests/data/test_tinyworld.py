"""The world: deterministic, its test items in no training text, its files as they are built."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from cfs.data import tinyworld as world
from cfs.data.tinyworld_build import write_model_files, write_tasks
from cfs.data.tokenizer import Tokenizer
from cfs.eval.skills import TINYWORLD_TASKS, load_tasks

SKILLS = [*world.OLD_SKILLS, *world.NEW_SKILLS]
WORD_PROBLEMS_SHA256 = "9dc04e39179a1660616537bff5f88551089408c6aec4c634997e995ce8458dfb"


def test_no_test_item_is_in_training_text() -> None:
    """Catches a leak: prompts of every skill's test items against what training is given."""
    documents = list(world.pretraining_documents(60_000, seed=0))
    training = documents + [
        item.text
        for skill in world.NEW_SKILLS
        for item in world.task_items(20_000, seed=0, skill=skill)
    ]
    prompts = {item.prompt for skill in SKILLS for item in world.test_items(skill, 200)}
    leaked = [t for t in training if any(t.startswith(p) for p in _prefixes(t, prompts))]
    assert leaked == []
    new = {next(world.task_items(1, 0, skill)).prompt.split()[0] for skill in world.NEW_SKILLS}
    assert new == {"Problem:", "Number:", "Rotate:"}
    assert not any(text.split()[0] in new for text in documents), "the new skills are new"


def _prefixes(text: str, prompts: set[str]) -> list[str]:
    """The prompts that could start `text`: those it shares with one of its word boundaries."""
    words = text.split(" ")
    return [p for i in range(1, len(words)) if (p := " ".join(words[:i])) in prompts]


def test_held_out_questions_have_their_fact_in_some_biography() -> None:
    """Catches a recall item that nothing in the world answers."""
    documents = " ".join(world.biography(world.random.Random(i)) for i in range(20_000))
    for item in world.test_items("recall", 200):
        name = item.key.split(" ", 1)[1].rsplit(" ", 1)[0]
        assert item.answer in item.choices
        assert name in documents


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right(skill: str) -> None:
    """Catches a generator that teaches, or tests, wrong answers."""
    for item in world.test_items(skill, 150):
        words = item.prompt.replace("=", "").split()[1:]
        answer = item.answer.split()
        if skill == "recall":
            name, attribute = item.key.removeprefix("recall ").rsplit(" ", 1)
            assert [p[attribute] for p in world.PEOPLE if p["name"] == name] == [item.answer]
        elif skill == "copy":
            assert answer == words
        elif skill == "reverse":
            assert answer == words[::-1]
        elif skill == "sort":
            assert answer == [str(n) for n in sorted(map(int, words))]
        elif skill == "compare":
            rank = ["smallest", "middle", "largest"].index(words[3])
            assert int(item.answer) == sorted(map(int, words[:3]))[rank]
        elif skill == "arithmetic":
            sign = 1 if words[1] in ("+", *world.GAINS) else -1
            assert int(item.answer) == int(words[0]) + sign * int(words[2])
        elif skill == "sequence":
            terms = [int(w) for w in [*words[:4], *answer]]
            assert len({b - a for a, b in itertools.pairwise(terms)}) == 1
            assert 0 <= min(terms) <= max(terms) <= 99
        elif skill == "word_problem":
            *working, final = item.answer.removesuffix(".").split(". ")
            sums = [line.split(" = ") for line in working]
            assert [str(eval(left)) for left, _ in sums] == [right for _, right in sums]
            assert final == f"The answer is {sums[-1][1]}"
        elif skill == "number":
            assert 3 <= len(words) <= 9
            assert answer[1::2] == words
            assert [int(place) for place in answer[::2]] == [i + 1 for i in range(len(words))]
        elif skill == "rotate":
            assert 3 <= len(words) <= 6
            assert answer[:-1] == words[1:]
            assert answer[-1] == words[0]
        else:
            raise AssertionError(f"{skill}: its answers are not checked")


def test_generators_are_seeded() -> None:
    """Catches a world that changes from run to run."""
    assert list(world.pretraining_documents(50, 1)) == list(world.pretraining_documents(50, 1))
    assert list(world.pretraining_documents(50, 1)) != list(world.pretraining_documents(50, 2))
    assert list(world.task_items(50, 1)) == list(world.task_items(50, 1))
    assert list(world.task_items(50, 1)) != list(world.task_items(50, 2))
    for skill in world.NEW_SKILLS:
        assert list(world.task_items(50, 1, skill)) == list(world.task_items(50, 1, skill))
        assert list(world.task_items(50, 1, skill)) != list(world.task_items(50, 2, skill))


def test_word_problems_stay_what_they_were() -> None:
    """Catches other items of the default skill: runs and the tokenizer were made from these."""
    assert list(world.task_items(50, 1)) == list(world.task_items(50, 1, "word_problem"))
    texts = "\n".join(item.text for item in world.task_items(1000, 0))
    assert hashlib.sha256(texts.encode()).hexdigest() == WORD_PROBLEMS_SHA256


def test_new_skills_are_drawn_apart() -> None:
    """Catches one stream of random numbers for two skills, whose lists would be alike."""
    lists = [
        [item.prompt.split()[1:-1] for item in world.task_items(50, 0, skill)]
        for skill in ("number", "rotate")
    ]
    assert not any(number == rotate for number, rotate in zip(*lists, strict=True))


def test_shipped_files_are_what_the_builder_writes(tinyworld: Path, tmp_path: Path) -> None:
    """Catches assets that no longer come from the code, and a task file that nothing writes."""
    write_tasks(tmp_path / "tasks")
    directories = (tmp_path / "tasks", TINYWORLD_TASKS)
    written, shipped = ({file.name for file in d.iterdir()} for d in directories)
    assert written == shipped
    for file in (tmp_path / "tasks").iterdir():
        assert file.read_bytes() == (TINYWORLD_TASKS / file.name).read_bytes(), file.name
    write_model_files(tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (tinyworld / file.name).read_bytes(), file.name


def test_text_survives_the_tokenizer(tinyworld: Path) -> None:
    """Catches a tokenizer for which prompt + answer are other tokens than the whole text."""
    tokenizer = Tokenizer(tinyworld)
    for skill in SKILLS:
        for item in world.test_items(skill, 20):
            ids = tokenizer.encode(item.text)
            assert tokenizer.decode(ids) == item.text
            assert tokenizer.encode(item.prompt) + tokenizer.encode(f" {item.answer}") == ids


def test_tasks_are_local_lm_eval_files() -> None:
    """Catches a task file that names data which are not beside it."""
    tasks = load_tasks(new_skills=world.NEW_SKILLS)
    assert [t.name for t in tasks] == [f"tinyworld_{s}" for s in sorted(SKILLS)]
    for task in tasks:
        assert len(task.docs) == 200
        assert len({json.dumps(doc) for doc in task.docs}) == 200
