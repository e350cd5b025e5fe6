"""The memory plan beside what a run really holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from cfs.cli import UserError
from cfs.model import ModelConfig, build_model, save_model
from cfs.model.config import parse_config
from cfs.model.weights import open_weights
from cfs.train import footprint, rehearsal
from cfs.train import plan as plans
from cfs.train.config import TrainConfig
from cfs.train.optim import OptimizerKind, ShardedAdamW
from cfs.train.parallel import local_shards
from cfs.train.plan import (
    BASE,
    CHECKPOINT,
    COPY,
    GIB,
    MASTERS,
    MERGE,
    REFERENCE,
    SPARE,
    STATES,
    TEACHER,
    TUNED,
    MemoryPlan,
    plan_memory,
    plan_run,
    print_plan,
    stored_dtype,
)
from cfs.train.reference import stored_rows
from cfs.train.stand_ins import ACTIVATIONS, GATHERED_WEIGHTS, GRADIENTS, HEAD
from tests.conftest import run_python, tiny_config, tiny_model

UNEVEN = tiny_config(vocab_size=1001, hidden_size=48, intermediate_size=80)


def model_directory(path: Path, **changes: object) -> Path:
    """Nothing in it but config.json."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_config(**changes)))
    return path


def planned(config: dict[str, Any], num_ranks: int = 1, **flags: Any) -> MemoryPlan:
    model_config = parse_config(config)
    flags = {"device": "cpu", "max_length": 32, "model": "somewhere"} | flags
    device_type = flags["device"]
    resolved = TrainConfig(**flags).resolved(device_type, model_config.max_position_embeddings)
    return plan_memory(resolved, model_config, torch.bfloat16, num_ranks, device_type, GIB)


def test_steps_take_what_was_rehearsed() -> None:
    """Catches buffers of FSDP, of the head, of attention or of recomputation that the rehearsal
    does not know, counts twice, or holds longer than a real step does."""
    result = run_python("-m", "tests.train.plan_peaks")
    assert result.returncode == 0, result.stderr
    for case, (rehearsed, real) in json.loads(result.stdout.splitlines()[-1]).items():
        assert rehearsed == pytest.approx(real, rel=0.03), case


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
def test_what_is_held_all_the_time_is_exact(
    tmp_path: Path, kind: OptimizerKind, masters: str
) -> None:
    """Catches forgotten scales of 8-bit blocks, small tensors taken for 8-bit ones, and a theta*
    in another dtype than `Reference` keeps."""
    save_model(tiny_model(**UNEVEN), tmp_path / "model", dtype=torch.bfloat16)  # type: ignore[arg-type]
    stored = open_weights(tmp_path / "model")
    model = build_model(stored.config).to(getattr(torch, masters))
    shards = local_shards(model)
    states = ShardedAdamW(shards, kind, 0.0, 0.999, 0).state_tensors().values()
    anchors = stored_rows(shards, stored)

    plan = planned(UNEVEN, optimizer=kind, masters=masters, l2=0.1, dtype=masters)
    assert plan.parts[MASTERS] == sum(p.nbytes for p in model.parameters())
    assert plan.parts[STATES] == sum(tensor.nbytes for tensor in states)
    assert plan.parts[REFERENCE] == sum(rows.nbytes for rows in anchors)
    assert plan.parts[CHECKPOINT] == plan.parts[MASTERS] + plan.parts[STATES]


def test_first_shard_of_uneven_rows() -> None:
    """Catches a plan for the average rank: the first holds the rounded-up share of every tensor,
    and only the ranks of one copy share."""
    shapes = [p.shape for p in build_model(parse_config(UNEVEN), device="meta").parameters()]
    own = sum(-(-shape[0] // 3) * shape[1:].numel() for shape in shapes)
    for flags in ({"num_ranks": 3}, {"num_ranks": 6, "shard_ranks": 3}):
        plan = planned(UNEVEN, optimizer="adamw", batch_size=128, micro_batch_tokens=64, **flags)
        assert plan.parts[MASTERS] == plan.parts[GRADIENTS] == 4 * own
        assert plan.parts[STATES] == 8 * own


def test_flags_move_the_part_they_are_for() -> None:
    """Catches a flag that the plan ignores."""
    large = tiny_config(num_hidden_layers=8, max_position_embeddings=512)
    plain = planned(large, micro_batch_tokens=1024, max_length=128)
    half = planned(large, micro_batch_tokens=512, max_length=128)
    assert 1.8 < plain.parts[ACTIVATIONS] / half.parts[ACTIVATIONS] < 2.1
    kept = [
        planned(large, micro_batch_tokens=1024, activation_checkpointing=kind).parts[ACTIVATIONS]
        for kind in ("none", "selective", "block")
    ]
    assert kept[0] > kept[1] > kept[2]
    assert GATHERED_WEIGHTS not in plain.parts, "one rank in its masters' dtype gathers nothing"
    assert GATHERED_WEIGHTS in planned(large, dtype="bfloat16").parts

    aside = planned(large, device="cuda", l2=0.1, offload_reference=True)
    beside = planned(large, device="cuda", l2=0.1)
    assert aside.host - beside.host == beside.parts[REFERENCE]
    assert REFERENCE not in aside.parts
    assert CHECKPOINT not in beside.parts, "which lies on the host"


def test_micro_batches_are_no_larger_than_the_batch() -> None:
    """Catches a plan for more tokens than a rank can get, or for fewer than a lone document."""
    assert "of 64 tokens" in planned(UNEVEN, micro_batch_tokens=10**6, batch_size=2).moment
    assert "of 32 tokens" in planned(UNEVEN, 8, micro_batch_tokens=10**6, batch_size=8).moment
    assert "of 32 tokens" in planned(UNEVEN, micro_batch_tokens=16).moment
    one, two = (planned(UNEVEN, 2, micro_batch_tokens=64, batch_size=n) for n in (4, 8))
    assert GRADIENTS not in one.parts, "before the only micro-batch there are none"
    assert GRADIENTS in two.parts


def test_the_base_counts_where_it_is_the_most() -> None:
    """Catches a plan that fits many ranks, each of which loads the whole base at first."""
    deep = tiny_config(num_hidden_layers=200, hidden_size=64)
    weights = sum(p.numel() for p in build_model(parse_config(deep), device="meta").parameters())
    flags = {"device": "cuda", "activation_checkpointing": "block", "batch_size": 64}
    assert planned(deep, 64, **flags).parts == {BASE: 2 * weights}
    scratch = planned(deep, 64, **flags, method="pretrain", steps=9)
    assert BASE not in scratch.parts
    assert scratch.host == 4 * weights, "every rank draws the whole model on its host"


def test_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    """Catches a plan that needs the weights' files, or believes config.json before them."""
    bare = model_directory(tmp_path / "bare", torch_dtype="bfloat16")
    config = parse_config(tiny_config(torch_dtype="bfloat16"))
    assert stored_dtype(bare, config) == torch.bfloat16
    assert stored_dtype(bare, replace(config, raw={"dtype": "float16"})) == torch.float16
    assert stored_dtype(bare, replace(config, raw={})) == torch.float32
    with pytest.raises(UserError, match=r"config\.json: dtype 'Tensor'"):
        stored_dtype(bare, replace(config, raw={"dtype": "Tensor"}))
    save_model(tiny_model(), tmp_path / "whole", dtype=torch.bfloat16)
    assert stored_dtype(tmp_path / "whole", replace(config, raw={})) == torch.bfloat16


def test_a_laptop_plans_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan that wants the GPU it plans for, or plans float32 on CPUs in its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = TrainConfig(model=str(model_directory(tmp_path / "model")), plan_ranks=2)
    given = plan_run(replace(config, plan_gib=80.0))
    assert (given.device_bytes, given.num_ranks) == (80 * GIB, 2)
    assert given.host > 0, "the host of a GPU"
    assert plan_run(config).host == 0, "without a device to plan for, this one"
    assert plan_run(replace(config, plan_gib=80.0, device="cpu")).host == 0
    with pytest.raises(UserError, match="--plan-gib"):
        plan_run(replace(config, device="cuda"))
    with pytest.raises(UserError, match="--shard-ranks 3"):
        plan_run(replace(config, shard_ranks=3))


def test_what_does_not_fit_is_told_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a verdict on the wrong side of the line, and remedies that are none."""
    path = model_directory(tmp_path / "model", num_hidden_layers=6, hidden_size=128)
    config = TrainConfig(model=str(path), plan_gib=1.0, plan_ranks=1, l2=0.1, optimizer="adamw")
    peak = plan_run(config).peak
    just = peak / (1 - SPARE) / GIB
    assert plan_run(replace(config, plan_gib=just * 1.001)).fits
    tight = plan_run(replace(config, plan_gib=just * 0.999))
    assert not tight.fits
    assert tight.parts == plan_run(config).parts
    assert {"--activation-checkpointing block", "--optimizer adamw8bit", "2 ranks"} <= set(
        tight.remedies
    )
    assert tight.remedies["all of these"] == min(tight.remedies.values())
    for said, other in tight.remedies.items():
        assert other < peak, said
    shown = Console(record=True, width=120)
    print_plan(tight, shown)
    text = shown.export_text()
    for said in ("does not fit", *tight.parts, *tight.remedies):
        assert said in text
    frugal = replace(
        config, activation_checkpointing="block", optimizer="adamw8bit", offload_reference=True
    )
    flags = plan_run(replace(frugal, plan_gib=just * 0.1)).remedies
    assert not any("block" in said or "adamw8bit" in said or "offload" in said for said in flags)


def test_every_part_is_explained() -> None:
    """Catches a part of the rehearsal that the table drops, so that its rows no longer add up."""
    work = footprint._work(TrainConfig(model="x").resolved("cpu", 128), 2, 2, "cpu")
    rehearsed = rehearsal.rehearse(parse_config(tiny_config()), work)
    assert set(rehearsed) <= set(plans.DECIDED_BY)
    assert {ACTIVATIONS, HEAD} <= set(rehearsed)


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan for a large model that needs the large model's memory."""
    real = nn.Module.to_empty

    def refused(self: nn.Module, **kwargs: Any) -> nn.Module:
        assert str(kwargs["device"]) == "meta"
        return real(self, **kwargs)

    monkeypatch.setattr(nn.Module, "to_empty", refused)
    huge: ModelConfig = parse_config(
        tiny_config("llama", vocab_size=128_256, hidden_size=8192, intermediate_size=28_672)
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 3}
    )
    config = TrainConfig(model="x", batch_size=64, max_length=128).resolved("cuda", 128)
    plan = plan_memory(config, huge, torch.bfloat16, 8, "cuda", 80 * GIB)
    assert plan.peak > 8 * GIB


def test_each_method_has_its_memory_in_the_plan() -> None:
    """Catches a method whose theta*, Fisher information, mask, adapters, copies or teacher the
    plan forgets, or counts for parameters that do not train."""
    flags: dict[str, Any] = {"optimizer": "adamw", "dtype": "float32"}
    shapes = [p.shape for p in build_model(parse_config(UNEVEN), device="meta").parameters()]
    weights = sum(shape.numel() for shape in shapes)
    plain = planned(UNEVEN, method="ft", **flags).parts

    def added(method: str, **more: Any) -> dict[str, int]:
        parts = planned(UNEVEN, method=method, **flags, **more).parts
        return {name: n - plain.get(name, 0) for name, n in parts.items() if n != plain.get(name)}

    assert added("cfs") == added("cs") == added("flow") == {}
    assert added("l2") == added("l2-init") == added("sfa") == {REFERENCE: 2 * weights}
    assert added("ewc") == {REFERENCE: 2 * weights, "Fisher information": 4 * weights}
    tuned = {"tuned": ["somewhere"]}
    assert added("hma", **tuned) == {REFERENCE: 2 * weights, TUNED: 4 * weights}
    lota = added("lota", **tuned)
    assert lota["mask"] == weights
    assert REFERENCE not in lota, "it is let go when the mask is made"
    assert added("distill")[TEACHER] > 2 * weights
    lora = added("lora", lora_rank=2)
    adapters = lora[MASTERS] // 4
    assert adapters == 2 * sum(sum(s) for s in shapes if len(s) == 2 and 1001 not in s)
    assert lora[STATES] == 8 * (adapters - weights)
    frozen = added("freeze", freeze="embeddings")
    assert frozen[STATES] == -8 * UNEVEN["vocab_size"] * UNEVEN["hidden_size"]  # type: ignore[operator]


def test_what_filters_an_update_needs_a_copy_of_the_largest_parameter() -> None:
    """Catches a peak in the optimizer's step that the plan does not know."""
    config = TrainConfig(method="mofo", max_length=32, model="somewhere").resolved("cpu", 128)
    shape = parse_config(UNEVEN)
    moments, _ = footprint.training_moments(config, shape, torch.bfloat16, 1, 1, "cpu")
    largest = max(p.numel() for p in build_model(parse_config(UNEVEN), device="meta").parameters())
    assert moments["the optimizer step"][COPY] == footprint.UPDATE_BYTES * largest


def test_a_merge_takes_one_parameter_of_each_model() -> None:
    """Catches the plan of a training that does not take place, and of whole models."""
    flags: dict[str, Any] = {"tuned": ["somewhere"], "kl_samples": 0, "dtype": "float32"}
    plan = planned(UNEVEN, method="wise-ft", **flags)
    largest = max(p.numel() for p in build_model(parse_config(UNEVEN), device="meta").parameters())
    assert plan.parts == {MERGE: largest * (3 * 4 + 2)}
    first_run = planned(UNEVEN, method="wise-ft", optimizer="adamw", dtype="float32")
    assert first_run.peak == planned(UNEVEN, method="ft", optimizer="adamw", dtype="float32").peak
