"""Runs of the methods that are more than a training loop, from flags to summary.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cfs.assets import TINYWORLD_DIR
from cfs.errors import UserError
from cfs.eval.experiment import fine_tune
from cfs.model import load_model, save_model
from cfs.train.config import TrainConfig
from tests.conftest import ALONE, read_metrics, run_python, tiny_model


def flags(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run of a few small steps of the embedded model, in `place/name`."""
    return {
        "out": str(place / name),
        "corpora": str(place / "corpora"),
        "steps": 4,
        "batch_size": 8,
        "kl_samples": 8,
        "skill_items": 2,
        "synthetic_ratio": 0.01,
        "device": "cpu",
    } | changes


def finished(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The summary of a run taken to its end."""
    config = TrainConfig(**flags(place, name, **changes))
    assert fine_tune(config, ALONE, flags=set())
    return json.loads((place / name / "summary.json").read_text())


def weights(model: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(model).named_parameters())


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_wise_ft_trains_first_and_leaves_a_model_for_each_alpha(tmp_path: Path) -> None:
    """Catches a sweep that averages the wrong pair, and end points that are not its inputs."""
    summary = finished(tmp_path, "run", method="wise-ft", wise_alpha=[0.5, 0.0, 1.0])
    run = tmp_path / "run"
    assert json.loads((run / "tuned" / "summary.json").read_text())["method"] == "ft"
    assert same(run / "models" / "alpha-0.0", run / "tuned" / "model")
    assert same(run / "models" / "alpha-1.0", TINYWORLD_DIR)
    star, tuned = weights(TINYWORLD_DIR), weights(run / "tuned" / "model")
    for name, value in weights(run / "model").items():
        torch.testing.assert_close(value, (star[name] + tuned[name]) / 2)
    assert list(summary["sweep"]) == ["alpha-0.5", "alpha-0.0", "alpha-1.0"]
    assert summary["sweep"]["alpha-0.5"]["kl_nats"] == summary["kl_nats"]
    assert abs(summary["sweep"]["alpha-1.0"]["kl_nats"]) < 1e-3, "theta* is theta*"
    assert summary["steps"] == 0
    alone = finished(tmp_path, "alone", method="ft")
    assert same(tmp_path / "alone" / "model", run / "tuned" / "model")
    again = {"method": "wise-ft", "tuned": [str(tmp_path / "alone" / "model")], "wise_alpha": [0.0]}
    given = finished(tmp_path, "given", **again)
    assert not (tmp_path / "given" / "tuned").exists()
    assert "sweep" not in given
    assert given["kl_nats"] == pytest.approx(alone["kl_nats"], rel=1e-4)


def test_a_run_stopped_in_its_first_part_goes_on_there(tmp_path: Path) -> None:
    """Catches a fine-tuned model that is half trained, or trained anew, and a forgotten flag."""
    whole = finished(tmp_path, "whole", method="lota", lota_sparsity=0.5)
    stopped = TrainConfig(**flags(tmp_path, "cut", method="lota", lota_sparsity=0.5, stop_after=2))
    assert not fine_tune(stopped, ALONE, flags=set())
    assert read_metrics(tmp_path / "cut" / "tuned")[-1]["step"] == 2
    assert not (tmp_path / "cut" / "metrics.jsonl").exists()
    resumed = TrainConfig(out=str(tmp_path / "cut"), resume=True)
    assert fine_tune(resumed, ALONE, flags={"out", "resume"})
    assert same(tmp_path / "cut" / "model", tmp_path / "whole" / "model")
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert summary["kl_nats"] == whole["kl_nats"]


def test_what_is_merged_is_the_result_of_all_other_methods(tmp_path: Path) -> None:
    """Catches wise-ft+lota that averages with plain fine-tuning and forgets lota."""
    finished(tmp_path, "run", method="wise-ft+lota", wise_alpha=[0.0], lota_sparsity=0.9)
    first = tmp_path / "run" / "tuned"
    assert json.loads((first / "summary.json").read_text())["method"] == "lota"
    assert json.loads((first / "tuned" / "summary.json").read_text())["method"] == "ft"
    assert same(tmp_path / "run" / "model", first / "model")
    star = weights(TINYWORLD_DIR)["embed_tokens.weight"]
    assert torch.equal(weights(tmp_path / "run" / "model")["embed_tokens.weight"], star)


def test_lora_leaves_a_merged_model_and_an_adapter(tmp_path: Path) -> None:
    """Catches a result without its update, or with the adapters' names in it."""
    finished(tmp_path, "run", method="lora", lora_rank=2, lr=1e-2)
    star, merged = weights(TINYWORLD_DIR), weights(tmp_path / "run" / "model")
    assert star.keys() == merged.keys()
    moved = {name for name in star if not torch.equal(star[name], merged[name])}
    assert moved == {name for name in star if "_proj" in name}
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == adapter["lora_alpha"] == 2


def test_a_merge_needs_no_task_and_can_leave_scores_out(tmp_path: Path) -> None:
    """Catches a merge of an 8B pair that reads data, or loads the model that it only streams."""
    for seed in (0, 1):
        save_model(tiny_model(seed=seed), tmp_path / f"m{seed}")
    (tmp_path / "m0" / "tokenizer.json").write_bytes(
        (TINYWORLD_DIR / "tokenizer.json").read_bytes()
    )
    config = TrainConfig(
        method="task-arithmetic",
        model=str(tmp_path / "m0"),
        tuned=[str(tmp_path / "m1")],
        data="nowhere.jsonl",
        format="text",
        kl_samples=0,
        task_scale=[1.0],
        out=str(tmp_path / "run"),
    )
    with pytest.raises(UserError, match="the tokenizer belongs to another model"):
        fine_tune(config, ALONE, flags=set())
    (tmp_path / "m0" / "tokenizer.json").write_text(word_tokenizer())
    assert fine_tune(config, ALONE, flags=set())
    merged, tuned = weights(tmp_path / "run" / "model"), weights(tmp_path / "m1")
    for name, value in tuned.items():
        torch.testing.assert_close(merged[name], value)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["kl_nats"] is None
    assert summary["skills"] == {}


def word_tokenizer() -> str:
    """A tokenizer.json of a few words."""
    import tokenizers

    words = {f"w{i}": i for i in range(97)}
    model = tokenizers.models.WordLevel(words, unk_token="w1")
    return tokenizers.Tokenizer(model).to_str()


TRAINED: dict[str, dict[str, Any]] = {
    "cs": {},
    "ssr": {},
    "replay": {},
    "flow": {},
    "ewc": {"fisher_samples": 16},
    "lora+cfs": {"lora_rank": 2, "lr": 1e-2},
}
MERGED: dict[str, dict[str, Any]] = {
    "wise-ft": {"wise_alpha": [0.5, 0.0]},
    "task-arithmetic": {"task_scale": [0.5, 1.5]},
}


@pytest.fixture(scope="module")
def on_one_and_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each method has run on one rank and on two, each drawing its own corpora.

    task-arithmetic merges what wise-ft's first run leaves, on one rank.
    """
    place = tmp_path_factory.mktemp("ranks")
    sums = [{"prompt": f"{i} + {i % 7} =", "response": str(i + i % 7)} for i in range(60)]
    (place / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    few = {"data": str(place / "sums.jsonl"), "format": "prompt-response"}
    configs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for num_ranks, ours in configs.items():
        for method, changes in (TRAINED | MERGED).items():
            corpora = str(place / f"corpora-{num_ranks}")
            given = {"method": method, "corpora": corpora} | changes
            if method == "flow":  # reads all examples before it trains
                given |= few
            if method == "task-arithmetic":
                given["tuned"] = [str(place / "wise-ft-1" / "tuned" / "model")]
            ours.append(flags(place, f"{method}-{num_ranks}", **given))
    for config in configs[1]:
        assert fine_tune(TrainConfig(**config), ALONE, flags=set())
    (place / "configs.json").write_text(json.dumps(configs[2]))
    done = run_python("-m", "tests.eval.several_runs", str(place / "configs.json"), ranks=2)
    assert done.returncode == 0, done.stderr
    return place


def check_same_losses(one: Path, two: Path) -> None:
    for a, b in zip(read_metrics(one)[1:], read_metrics(two)[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["targets_synthetic"] == b["targets_synthetic"]


def check_same_model(one: Path, two: Path) -> None:
    """Apart by little of what they moved from theta*."""
    a, b, star = weights(one), weights(two), weights(TINYWORLD_DIR)
    assert a.keys() == b.keys() == star.keys()
    with torch.no_grad():
        apart = math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in star))
        moved = math.sqrt(sum(float((a[name] - star[name]).square().sum()) for name in star))
    assert moved > 0
    assert apart < 3e-4 * moved


@pytest.mark.parametrize("method", TRAINED)
def test_two_ranks_do_what_one_does(method: str, on_one_and_two: Path) -> None:
    """Catches examples, weights or samples that depend on the number of ranks, and a sharded
    adapter that is merged or saved wrongly."""
    one, two = (on_one_and_two / f"{method}-{num_ranks}" for num_ranks in (1, 2))
    check_same_losses(one, two)
    check_same_model(one / "model", two / "model")


@pytest.mark.parametrize("method", MERGED)
def test_two_ranks_merge_as_one_does(method: str, on_one_and_two: Path) -> None:
    """Catches a rank that reads a model before it is written, a first run that differs from one
    rank's, and a KL or a skill of one rank's share of the samples."""
    one, two = (on_one_and_two / f"{method}-{num_ranks}" for num_ranks in (1, 2))
    if method == "wise-ft":
        check_same_losses(one / "tuned", two / "tuned")
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    assert list(a["sweep"]) == list(b["sweep"])
    assert len(a["sweep"]) == 2
    for variant, found in a["sweep"].items():
        expected = pytest.approx(found["kl_nats"], abs=2e-5)
        assert b["sweep"][variant]["kl_nats"] == expected
        assert b["sweep"][variant]["skills"] == found["skills"]
    places = ["model", *sorted(str(path.relative_to(one)) for path in (one / "models").iterdir())]
    assert len(places) == 2
    for place in places:
        check_same_model(one / place, two / place)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "lora", "lora_targets": "q_proj,magic"}, "--lora-targets q_proj,magic"),
        ({"method": "freeze", "freeze": "head"}, "has no parameter of it"),
        ({"method": "freeze", "freeze": "everything"}, "--freeze everything: expected"),
        ({"method": "wise-ft", "tuned": ["a", "b"]}, "wise-ft takes one"),
        ({"method": "wise-ft", "wise_alpha": [1.5]}, "--wise-alpha"),
        ({"method": "ft", "tuned": ["a"]}, "needs no other model"),
        ({"method": "cfs", "mofo_fraction": 0.1}, "use --method cfs+mofo"),
        ({"method": "ft", "temperature": 0.5}, "mixes no samples in"),
        ({"method": "cfs+cs", "temperature": 0.5}, "mixes several kinds of samples in"),
        ({"method": "hma", "hma_blocks": 99, "tuned": [str(TINYWORLD_DIR)]}, "--hma-blocks 99"),
        ({"method": "ssr", "demos": "nowhere.jsonl"}, "--demos nowhere.jsonl: no such file"),
        ({"method": "replay", "replay_data": "nowhere.jsonl"}, "--replay-data nowhere.jsonl"),
        ({"skill": "juggling"}, "--skill juggling"),
        ({"kl_samples": 1}, "--kl-samples 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Catches a traceback, or a run that begins with a flag that it ignores."""
    with pytest.raises(UserError) as refused:
        fine_tune(TrainConfig(**flags(tmp_path, "run", **changes)), ALONE, flags=set())
    assert said in str(refused.value)


def test_a_tuned_model_of_another_shape_is_refused_before_any_work(tmp_path: Path) -> None:
    """Catches a mismatch that shows after the training that it makes useless."""
    save_model(tiny_model(), tmp_path / "other")
    config = TrainConfig(**flags(tmp_path, "run", method="hma", tuned=[str(tmp_path / "other")]))
    with pytest.raises(UserError, match=r"--tuned .*other: is no model of the shape"):
        fine_tune(config, ALONE, flags=set())
    assert not (tmp_path / "run").exists()
