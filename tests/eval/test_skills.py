"""The light scorer, on models whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cfs.data import tinyworld as world
from cfs.data.tokenizer import Tokenizer
from cfs.eval.skills import Score, load_tasks, score_tasks
from cfs.model import Decoder, load_model
from cfs.train.kl import sequence_logprobs
from tests.conftest import ALONE


@pytest.fixture
def base(tinyworld: Path) -> Decoder:
    return load_model(tinyworld)


def test_the_shipped_base_has_the_skills_it_should(tinyworld: Path, base: Decoder) -> None:
    """Catches a base that was exchanged, or a scorer that drifted: old skills known but not
    saturated, the new ones unknown."""
    tasks = load_tasks(new_skills=world.NEW_SKILLS)
    scores = score_tasks(base, Tokenizer(tinyworld), tasks, 200, ALONE)
    for name in world.NEW_SKILLS:
        assert scores.pop(name).accuracy <= 0.02, name
    assert len(scores) >= 5
    for name, score in scores.items():
        assert 0.70 <= score.accuracy <= 0.98, (name, score)


def test_generation_is_scored_like_one_by_one(tinyworld: Path, base: Decoder) -> None:
    """Catches a batch whose prompts or outputs are mixed up: the plain twin decodes alone."""
    tokenizer = Tokenizer(tinyworld)
    (task,) = (t for t in load_tasks() if t.name == "tinyworld_sort")
    correct = 0
    for doc in task.docs[:30]:
        ids = [tokenizer.seed_id, *tokenizer.encode(doc["prompt"])]
        start = len(ids)
        while len(ids) < start + 40 and (len(ids) == start or ids[-1] != tokenizer.eos_id):
            with torch.no_grad():
                ids.append(int(base(torch.tensor([ids]))[0, -1].argmax()))
        correct += tokenizer.decode(ids[start:]).strip() == doc["answer"]
    scores = score_tasks(base, tokenizer, [task], 30, ALONE)
    assert scores["sort"].accuracy == pytest.approx(correct / 30)


def test_choices_are_scored_by_their_own_tokens(tinyworld: Path, base: Decoder) -> None:
    """Catches scoring the prompt too, or ranking by something else than the sum."""
    tokenizer = Tokenizer(tinyworld)
    (task,) = (t for t in load_tasks() if t.name == "tinyworld_recall")
    correct = 0
    for doc in task.docs[:30]:
        prompt = [tokenizer.seed_id, *tokenizer.encode(doc["prompt"])]
        totals = []
        for choice in doc["choices"]:
            answer = tokenizer.encode(f" {choice}")
            with torch.no_grad():
                logprobs = base(torch.tensor([prompt + answer]))[0].log_softmax(-1)
            totals.append(
                sum(float(logprobs[len(prompt) - 1 + i, t]) for i, t in enumerate(answer))
            )
        correct += doc["choices"][totals.index(max(totals))] == doc["answer"]
    assert score_tasks(base, tokenizer, [task], 30, ALONE)["recall"].accuracy == correct / 30


def test_sequence_logprobs_keep_their_owner(tinyworld: Path, base: Decoder) -> None:
    """Catches sums that land on another example after sorting by length."""
    from cfs.data.formats import make_example

    texts = [[0, *range(3, 3 + n)] for n in (9, 2, 30, 5, 17)]
    ids, sums = sequence_logprobs(base, [make_example(t, 1) for t in texts], 40, ALONE)
    assert sorted(ids) == list(range(5))
    for i, total in zip(ids, sums, strict=True):
        with torch.no_grad():
            logprobs = base(torch.tensor([texts[i]]))[0].log_softmax(-1)
        expected = sum(float(logprobs[t - 1, texts[i][t]]) for t in range(1, len(texts[i])))
        assert total == pytest.approx(expected, abs=1e-4)


def test_standard_error() -> None:
    score = Score.of([True] * 80 + [False] * 20)
    assert score.accuracy == 0.8
    assert score.se == pytest.approx(0.0402, abs=1e-4)


def test_a_task_reads_only_its_own_directory(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    (tmp_path / "t.yaml").write_text(
        "task: tinyworld_t\ndataset_kwargs: {data_files: {test: t.jsonl}}\n"
    )
    (task,) = load_tasks(tmp_path)
    assert task.docs == [{"prompt": "a", "answer": "b"}]


def test_only_new_skills_asked_for_are_scored() -> None:
    """Catches a run that scores skills it has nothing to do with, or misses its own."""

    old = set(world.OLD_SKILLS)
    assert {task.skill for task in load_tasks()} == old | {"word_problem"}
    for asked in ([], ["rotate"], ["number", "word_problem"]):
        assert {task.skill for task in load_tasks(new_skills=asked)} == old | set(asked)
    with pytest.raises(AssertionError, match="typo"):
        load_tasks(new_skills=["typo"])
