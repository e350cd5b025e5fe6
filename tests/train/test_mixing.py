"""What stands beside the task's examples, drawn from the embedded model in small numbers."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfs.assets import TINYWORLD_DIR
from cfs.baselines import METHODS
from cfs.baselines.ssr import endings, instance_input
from cfs.data import tinyworld
from cfs.data.formats import FORMATS, Example, make_examples
from cfs.data.mixture import Source
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import Decoder, load_model
from cfs.ranks import Ranks
from cfs.sample.sample import Sample
from cfs.train.config import PRETRAIN_DEFAULTS, TrainConfig
from cfs.train.draws import Draws
from cfs.train.mixing import SOURCES, _instance, mixed_sources
from tests.conftest import ALONE

MAX_LENGTH = 96
TOKENIZER = Tokenizer(TINYWORLD_DIR)


@cache
def base() -> Decoder:
    return load_model(TINYWORLD_DIR)


@cache
def task(count: int = 4) -> tuple[Example, ...]:
    """Word problems, each with a prompt of its own."""
    records = [FORMATS["tinyworld"](asdict(item)) for item in tinyworld.task_items(count, seed=0)]
    return tuple(make_examples(records, TOKENIZER, MAX_LENGTH))


def draws_in(place: Path, tokenizer: Tokenizer = TOKENIZER) -> Draws:
    return Draws(place / "corpora", TINYWORLD_DIR, base(), tokenizer, ALONE)


def mixed(
    place: Path, method: str, tokenizer: Tokenizer = TOKENIZER, **flags: object
) -> list[Source]:
    """The sources that a method adds to the task's."""
    given: dict[str, object] = {"max_length": MAX_LENGTH}
    config = TrainConfig(method=method, **(given | flags)).resolved("cpu", 256)  # type: ignore[arg-type]
    sources = [Source("task", list(task()[:3])), Source("more", list(task()[3:]))]
    return mixed_sources(config, draws_in(place, tokenizer), sources)


def added(place: Path, method: str, **flags: object) -> list[Example]:
    """The examples of the only one."""
    (source,) = mixed(place, method, **flags)
    assert source.synthetic
    return source.examples


def prompt_of(example: Example) -> list[int]:
    return example.input_ids[: int(example.target_mask.argmax())].tolist()


def settings_in(place: Path) -> list[dict[str, Any]]:
    """Of the corpora that were drawn."""
    manifests = (place / "corpora").glob("*/manifest.json")
    return [json.loads(file.read_text())["settings"] for file in manifests]


def law_in(place: Path) -> tuple[float, float]:
    """Temperature and top-p of the only one."""
    (settings,) = settings_in(place)
    return settings["sampling"]["temperature"], settings["sampling"]["top_p"]


def corpus_in(place: Path) -> str:
    (directory,) = (place / "corpora").iterdir()
    return str(directory)


def test_every_mix_has_a_source() -> None:
    """Catches a method whose examples nothing brings."""
    kinds = {method.mix.kind for method in METHODS.values() if method.mix is not None}
    assert kinds == SOURCES.keys()


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 4), (0.5, 2), (1.5, 6)])
def test_cfs_mixes_context_free_samples(ratio: float, count: int, tmp_path: Path) -> None:
    """Catches a seed token that is a target, a first token that is none, samples drawn after a
    prompt, and a ratio of tokens or of the batch in place of examples."""
    examples = added(tmp_path, "cfs", synthetic_ratio=ratio)
    assert len(examples) == count
    for example in examples:
        assert example.input_ids[0] == TOKENIZER.seed_id
        assert not example.target_mask[0]
        assert example.target_mask[1:].all()
        assert 2 <= len(example.input_ids) <= MAX_LENGTH
        is_ended = example.input_ids[-1] == TOKENIZER.eos_id
        assert is_ended or len(example.input_ids) == MAX_LENGTH
    assert len({tuple(example.input_ids) for example in examples}) == count
    assert law_in(tmp_path) == (1.0, 0.95)


def test_cs_mixes_answers_to_the_tasks_prompts(tmp_path: Path) -> None:
    """Catches prompts that are trained on, prompts cut short or without their seed token, and the
    task's own answers in place of the base's."""
    examples = added(tmp_path, "cs", synthetic_ratio=1.5)
    prompts = [prompt_of(example) for example in task()]
    assert [prompt_of(example) for example in examples] == [*prompts, *prompts[:2]]
    for example in examples:
        start = len(prompt_of(example))
        assert start > 5
        assert example.target_mask[start:].all()
    answers = [example.input_ids[example.target_mask].tolist() for example in examples]
    assert answers[:4] != [e.input_ids[e.target_mask].tolist() for e in task()]
    assert law_in(tmp_path) == (0.6, 0.95)


def test_flags_decide_how_samples_are_drawn(tmp_path: Path) -> None:
    """Catches `--temperature`, `--top-p` and `--seed` unread beside a method's own defaults."""
    added(tmp_path, "cs", temperature=0.25, top_p=0.5, seed=7)
    assert law_in(tmp_path) == (0.25, 0.5)
    (settings,) = settings_in(tmp_path)
    assert settings["sampling"]["seed"] == 7


def test_two_methods_add_a_source_each(tmp_path: Path) -> None:
    """Catches a mix of which one kind takes the other's place or its share."""
    sources = mixed(tmp_path, "cfs+replay", synthetic_ratio=0.75)
    assert [(s.name, len(s.examples)) for s in sources] == [("sample", 3), ("document", 3)]
    assert mixed(tmp_path, "ft") == []


def test_replay_mixes_pretraining_documents(tmp_path: Path) -> None:
    """Catches text of a world that the base never met, a document twice, targets that begin at the
    second token, and documents without their end."""
    seen = []
    for seed in range(3):
        examples = added(tmp_path, "replay", seed=seed)
        assert len(examples) == 4
        for example in examples:
            assert example.input_ids[0] == TOKENIZER.seed_id
            assert example.input_ids[-1] == TOKENIZER.eos_id
            assert example.target_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)
            seen.append(TOKENIZER.decode(example.input_ids.tolist()))
    met = PRETRAIN_DEFAULTS["steps"] * PRETRAIN_DEFAULTS["batch_size"]
    texts = itertools.islice(tinyworld.pretraining_documents(met, seed=0), 12)
    known = make_examples([("", text) for text in texts], TOKENIZER, MAX_LENGTH)
    assert seen == [TOKENIZER.decode(example.input_ids.tolist()) for example in known]
    assert not (tmp_path / "corpora").exists(), "nothing is drawn"


def test_replay_takes_the_file_that_is_given(tmp_path: Path) -> None:
    """Catches always the first records, records twice, and too short a file in silence."""
    file = tmp_path / "text.jsonl"
    texts = [f"document {number}" for number in range(20)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    chosen = []
    for seed in (0, 1):
        examples = added(tmp_path, "replay", replay_data=str(file), seed=seed)
        found = [TOKENIZER.decode(example.input_ids.tolist()) for example in examples]
        assert len(set(found)) == 4
        chosen.append(found)
    assert chosen[0] != chosen[1]
    with pytest.raises(UserError, match=r"holds 20 records; --synthetic-ratio 6\.0 asks for 24"):
        mixed(tmp_path, "replay", replay_data=str(file), synthetic_ratio=6.0)


@pytest.mark.parametrize("method", ["replay", "ssr"])
def test_another_model_needs_data_of_its_own(method: str, tmp_path: Path) -> None:
    """Catches TinyWorld's text in the name of a model that was pretrained on something else."""
    other = tmp_path / "other"
    shutil.copytree(TINYWORLD_DIR, other)
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    flag = "--replay-data" if method == "replay" else "--demos"
    with pytest.raises(UserError, match=f"^--method {method}: needs {flag}, [^\n]+$"):
        mixed(tmp_path, method, Tokenizer(other))


def greedy_answer(prompt: list[int], count: int) -> list[int]:
    """The base's most probable continuation, by whole forward passes."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            ids.append(int(base()(torch.tensor([ids]))[0, -1, : TOKENIZER.num_tokens].argmax()))
    return ids[len(prompt) :]


def word_demonstrations(place: Path) -> tuple[Path, set[str]]:
    """A file of them, whose prompts end with words that the base often writes, and the endings."""
    words = "needle garden stone paper jacket river letter chair orange lamp".split()
    rows = [
        {"prompt": f"{copy} {word}", "response": f" {word}"}
        for word in words
        for copy in ("Copy", "Copy:")
    ]
    file = place / "demos.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file, {f" {word}" for word in words}


def test_ssr_mixes_instances_that_the_base_wrote_and_answered(tmp_path: Path) -> None:
    """Catches inputs that are trained on, answers that were sampled, or written with the input, and
    demonstrations left in an instance."""
    file, ends = word_demonstrations(tmp_path)
    examples = added(tmp_path, "ssr", demos=str(file), synthetic_ratio=1.5)
    assert 2 <= len(examples) <= 6
    inputs = [TOKENIZER.decode(prompt_of(example)) for example in examples]
    assert len(set(inputs)) == len(inputs)
    for example, text in zip(examples, inputs, strict=True):
        prompt = prompt_of(example)
        assert prompt[0] == TOKENIZER.seed_id
        assert TOKENIZER.eos_id not in prompt[1:]
        assert instance_input(text, ends) == text, "it ends as some prompt does, and no later"
        answer = example.input_ids[example.target_mask].tolist()
        assert example.target_mask[len(prompt) :].all()
        assert answer == greedy_answer(prompt, len(answer))
        assert answer[-1] == TOKENIZER.eos_id or len(example.input_ids) == MAX_LENGTH
    laws = [settings["sampling"] for settings in settings_in(tmp_path)]
    assert {(law["temperature"], law["top_p"]) for law in laws} == {(0.9, 0.6), (0.0, 1.0)}


def test_ssr_shows_the_worlds_old_skills_by_default(tmp_path: Path) -> None:
    """Catches demonstrations of the new skill, or of one old skill alone."""
    examples = added(tmp_path, "ssr", synthetic_ratio=6.0)
    prompts = [tinyworld.test_items(skill, 20) for skill in tinyworld.OLD_SKILLS]
    ends = endings([item.prompt for item in itertools.chain(*prompts)])
    assert len(ends) == 6
    for example in examples:
        text = TOKENIZER.decode(prompt_of(example))
        assert instance_input(text, ends) == text


def test_ssr_keeps_as_many_instances_as_asked(tmp_path: Path) -> None:
    """Catches what was oversampled being answered too, the first ones kept in place of those near
    the centroids, and a choice that changes from run to run."""
    file, _ = word_demonstrations(tmp_path)
    flags = {"demos": str(file), "temperature": 3.0, "top_p": 1.0, "synthetic_ratio": 2.0}
    examples = added(tmp_path, "ssr", **flags)
    found = [example.input_ids.tolist() for example in examples]
    assert len(found) == 8
    assert len({tuple(ids) for ids in found}) == 8
    counts = {s["sampling"]["temperature"]: s["num_samples"] for s in settings_in(tmp_path)}
    assert counts == {3.0: 16, 0.0: 8}
    again = [e.input_ids.tolist() for e in added(tmp_path / "again", "ssr", **flags)]
    assert again == found


def test_ssr_says_what_is_wrong_with_demonstrations(tmp_path: Path) -> None:
    """Catches a crash, or an empty source, where nothing that the base writes has an input, or
    nothing could have one; and samples drawn to no purpose."""
    file = tmp_path / "demos.jsonl"

    def give(*prompts: str) -> None:
        rows = [{"prompt": prompt, "response": " a b"} for prompt in prompts]
        file.write_text("\n".join(map(json.dumps, rows)))

    give("copy: " + "a b " * 150, "copy: a b ")
    with pytest.raises(UserError, match="leaves no room in the model's context; give shorter"):
        mixed(tmp_path, "ssr", demos=str(file))
    give("copy: a b", "sort it")
    with pytest.raises(UserError, match=r"^--demos: its prompts end in nothing common"):
        mixed(tmp_path, "ssr", demos=str(file))
    assert not settings_in(tmp_path)
    give("sort: a b Unsaid", "sort: b a Unsaid")
    with pytest.raises(UserError, match=r"none of 2 instances .* ends with one of ' Unsaid' with"):
        mixed(tmp_path, "ssr", demos=str(file), synthetic_ratio=0.25, seed=1)


def test_what_the_base_wrote_keeps_its_special_tokens(tmp_path: Path) -> None:
    """Catches R1's "<｜Assistant｜>" dropped from an instance, whose input would never end, and the
    next document taken for a part of it."""
    shutil.copytree(TINYWORLD_DIR, tmp_path / "other")
    tokenizer = Tokenizer(tmp_path / "other")
    tokenizer.backend.add_special_tokens(["<｜Assistant｜>"])
    prompt, written = tokenizer.encode("Sum: 1 + 2 = 3"), tokenizer.encode("Sum<｜Assistant｜> 3")
    assert tokenizer.backend.token_to_id("<｜Assistant｜>") in written
    ids = [tokenizer.seed_id, *prompt, *written, tokenizer.eos_id, *prompt]
    sample = Sample(0, np.array(ids), 1 + len(prompt), np.zeros(0), np.zeros(0), "stop")
    text = _instance(sample, tokenizer)
    assert text.startswith("Sum")
    assert "<｜Assistant｜>" in text
    assert text.count("Sum") == 1
    assert "=" not in text


def test_instances_may_be_as_long_as_the_model_allows(tmp_path: Path) -> None:
    """Catches a bound of its own, which cuts off inputs that the demonstrations are as long as."""
    added(tmp_path, "ssr", synthetic_ratio=0.5)
    written = [s["sampling"]["max_tokens"] for s in settings_in(tmp_path) if s["num_samples"] == 4]
    assert written == [MAX_LENGTH - 1]


def test_rank_0_alone_chooses_among_instances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that embed and choose by themselves, and differ where a last bit does."""
    asked = []

    def on_main(self: Ranks, function: Callable[[], Any]) -> Any:
        found = function()
        asked.append(found)
        return found

    monkeypatch.setattr(Ranks, "on_main", on_main)
    file, _ = word_demonstrations(tmp_path)
    flags = {"demos": str(file), "temperature": 3.0, "top_p": 1.0, "synthetic_ratio": 2.0}
    assert len(added(tmp_path, "ssr", **flags)) == 8
    chosen = [found for found in asked if isinstance(found, list) and len(found) == 8]
    assert len(chosen) == 1
    assert all(type(index) is int for index in chosen[0])


@pytest.mark.parametrize("method", ["cfs", "cs"])
def test_a_given_corpus_serves_as_a_drawn_one(method: str, tmp_path: Path) -> None:
    """Catches other targets or other samples for the same corpus by `--synthetic`."""
    drawn = added(tmp_path, method)
    given = added(
        tmp_path / "elsewhere", method, synthetic=corpus_in(tmp_path), synthetic_ratio=0.5
    )
    for one, other in zip(drawn[:2], given, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.target_mask, other.target_mask)
    with pytest.raises(UserError, match=r"holds 4 samples; --synthetic-ratio 2\.0 asks for 8"):
        mixed(tmp_path, method, synthetic=corpus_in(tmp_path), synthetic_ratio=2.0)


@pytest.mark.parametrize(
    ("drawn_for", "method", "message"),
    [
        ("cs", "cfs", "holds answers to prompts; --method cfs needs context-free samples"),
        ("cfs", "cs", "holds context-free samples; --method cs needs answers to prompts"),
    ],
)
def test_a_corpus_of_the_other_kind_is_refused(
    drawn_for: str, method: str, message: str, tmp_path: Path
) -> None:
    """Catches a method trained on the samples of its rival, under its own name."""
    added(tmp_path, drawn_for)
    with pytest.raises(UserError, match=message) as refusal:
        mixed(tmp_path, method, synthetic=corpus_in(tmp_path))
    assert str(refusal.value).startswith("--synthetic ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method", ["cfs", "cs", "replay", "ssr"])
def test_a_ratio_below_one_example_is_refused(method: str, tmp_path: Path) -> None:
    """Catches plain fine-tuning under another name."""
    with pytest.raises(UserError, match=r"^--synthetic-ratio 0\.1: is less than one [^\n]+$"):
        mixed(tmp_path, method, synthetic_ratio=0.1)
