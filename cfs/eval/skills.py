"""A light scorer for lm-eval task files: multiple choice and greedy generation, exact match.

Reads the part of lm-eval's YAML that the TinyWorld tasks use, with lm-eval's meaning, so that the
harness itself can run the same files: `doc_to_*` as Jinja templates or field names, " " between
prompt and answer, `acc` as the choice of largest summed log-probability, and `exact_match` of the
first group that the filter's regex finds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from cfs.data import tinyworld
from cfs.data.formats import make_example
from cfs.data.tokenizer import Tokenizer
from cfs.model import Decoder
from cfs.progress import Bar
from cfs.ranks import Ranks
from cfs.sample.sampler import Request, SamplingSettings, generate
from cfs.train.kl import sequence_logprobs

TINYWORLD_TASKS = Path(__file__).parent / "tasks" / "tinyworld"
TASK_PREFIX = "tinyworld_"
SCORING_TOKENS, SCORING_SLOTS = 4096, 128


@dataclass(frozen=True)
class Task:
    """One task file and its test items."""

    name: str
    config: dict[str, Any]
    docs: list[dict[str, Any]]

    @property
    def skill(self) -> str:
        return self.name.removeprefix(TASK_PREFIX)


@dataclass(frozen=True)
class Score:
    """Share of items answered right, and its standard error."""

    accuracy: float
    se: float
    num_items: int

    @classmethod
    def of(cls, correct: list[bool]) -> Score:
        accuracy = float(np.mean(correct))
        se = math.sqrt(accuracy * (1 - accuracy) / max(1, len(correct) - 1))
        return cls(accuracy, se, len(correct))


def load_tasks(
    directory: Path = TINYWORLD_TASKS, new_skills: Collection[str] = (tinyworld.NEW_SKILL,)
) -> list[Task]:
    """The task files of a directory, but for new skills that are not asked for.

    new_skills  of `tinyworld.NEW_SKILLS`, those to score beside whatever else the directory has

    A task's data file lies beside it.
    """
    unknown = set(new_skills) - tinyworld.NEW_SKILLS.keys()
    assert not unknown, f"new skills {unknown}: not in tinyworld.NEW_SKILLS"
    others = tinyworld.NEW_SKILLS.keys() - set(new_skills)
    tasks = []
    for file in sorted(directory.glob("*.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if config["task"].removeprefix(TASK_PREFIX) in others:
            continue
        data = directory / config["dataset_kwargs"]["data_files"]["test"]
        docs = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        tasks.append(Task(config["task"], config, docs))
    return tasks


def score_tasks(
    model: Decoder, tokenizer: Tokenizer, tasks: list[Task], num_items: int, ranks: Ranks
) -> dict[str, Score]:
    """Score the first `num_items` items of each task; ranks share the tasks. Collective."""
    alone = Ranks(rank=0, world_size=1, device=ranks.device)
    own = tasks[ranks.rank :: ranks.world_size]
    scores: dict[str, Score] = {}
    with Bar("score skills", len(own), enabled=ranks.is_main) as bar:
        for task in own:
            docs = task.docs[:num_items]
            if task.config["output_type"] == "multiple_choice":
                correct = _score_choices(model, tokenizer, task, docs, alone)
            else:
                correct = _score_generations(model, tokenizer, task, docs)
            scores[task.skill] = Score.of(correct)
            bar.advance(1, f"{task.skill} {scores[task.skill].accuracy:.1%}")
    gathered = {name: s for part in ranks.gather(scores) for name, s in part.items()}
    return {name: gathered[name] for name in sorted(gathered)}


def _score_choices(
    model: Decoder, tokenizer: Tokenizer, task: Task, docs: list[dict[str, Any]], ranks: Ranks
) -> list[bool]:
    """lm-eval's `acc`: is the right choice the one of largest log p(choice | prompt)?"""
    examples, owner = [], []
    for number, doc in enumerate(docs):
        choices = [f" {choice}" for choice in _choices(task, doc)]
        prompts = [_render(task, "doc_to_text", doc)] * len(choices)
        for prompt, choice in tokenizer.encode_continuations(prompts, choices):
            ids = [tokenizer.seed_id, *prompt, *choice]
            examples.append(make_example(ids, first_target=1 + len(prompt)))
            owner.append(number)
    ids, logprobs = sequence_logprobs(model, examples, SCORING_TOKENS, ranks)
    by_doc: list[list[float]] = [[] for _ in docs]
    for i in np.argsort(ids):
        by_doc[owner[ids[i]]].append(float(logprobs[i]))
    gold = [int(_render(task, "doc_to_target", doc)) for doc in docs]
    return [int(np.argmax(scores)) == g for scores, g in zip(by_doc, gold, strict=True)]


def _score_generations(
    model: Decoder, tokenizer: Tokenizer, task: Task, docs: list[dict[str, Any]]
) -> list[bool]:
    """lm-eval's `exact_match` of greedy generations, after the task's filter."""
    options = task.config["generation_kwargs"]
    prompts = [
        [tokenizer.seed_id, *tokenizer.encode(_render(task, "doc_to_text", doc))] for doc in docs
    ]
    longest_first = sorted(range(len(docs)), key=lambda i: -len(prompts[i]))
    outputs: dict[int, str] = {}
    for sample in generate(
        model,
        (Request(i, prompts[i]) for i in longest_first),
        SamplingSettings(max_tokens=options["max_gen_toks"], temperature=0.0),
        tokenizer.eos_id,
        tokenizer.num_tokens,
        SCORING_SLOTS,
        max_prompt_tokens=max(map(len, prompts)),
    ):
        text = tokenizer.decode(sample.input_ids[sample.num_prompt_tokens :].tolist())
        for stop in options["until"]:
            text = text.split(stop)[0]
        outputs[sample.index] = text
    pattern = re.compile(task.config["filter_list"][0]["filter"][0]["regex_pattern"])
    correct = []
    for i, doc in enumerate(docs):
        found = pattern.findall(outputs[i])
        correct.append(bool(found) and found[0] == _render(task, "doc_to_target", doc))
    return correct


def _render(task: Task, key: str, doc: dict[str, Any]) -> str:
    template = task.config[key]
    return str(doc[template]) if template in doc else jinja2.Template(template).render(doc)


def _choices(task: Task, doc: dict[str, Any]) -> list[str]:
    return doc[task.config["doc_to_choice"]]
