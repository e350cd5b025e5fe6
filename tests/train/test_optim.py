"""The schedule, and AdamW on the rows of ranks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cfs.errors import UserError
from cfs.train import optim
from cfs.train.optim import OptimizerKind, ShardedAdamW, check_optimizer, cosine_lr
from cfs.train.parallel import local_shards
from tests.conftest import ALONE, run_python, tiny_model
from tests.train.cut import (
    BETA2,
    WEIGHT_DECAY,
    CutRun,
    Tensors,
    random_grads,
    random_weights,
    trained,
)
from tests.train.optim_steps import CASES, take_steps

SAME_ON_ALL_RANKS = ("lined_up", "small", "three_rows", "gain", "long_gain")
KINDS: tuple[OptimizerKind, ...] = ("adamw", "adamw8bit")


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def assert_same(a: Tensors, b: Tensors, names: tuple[str, ...] | None = None) -> None:
    """Bit for bit."""
    for name in names or tuple(a):
        assert torch.equal(a[name], b[name]), name


def test_schedule() -> None:
    """Catches a first step at zero, a peak never reached, a last step that is not small."""
    rates = [cosine_lr(step, 100, 2.0, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert max(rates) == rates[2]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert cosine_lr(0, 1, 2.0, 0.03) == 2.0, "a run of one step does something"
    assert cosine_lr(51, 100, 2.0, 0.02) == pytest.approx(1.0)


def test_float_moments_are_torchs_adamw() -> None:
    """Catches a wrong bias correction, decay of gains, a clip applied twice or after the step."""
    run = trained("adamw", 1, steps=0)
    theirs = {name: nn.Parameter(value) for name, value in random_weights().items()}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, BETA2), fused=True)
    for step in range(10):
        lr, grads = 1e-3 / (step + 1), random_grads(step)
        for group in reference.param_groups:
            group["lr"] = lr
        for name, parameter in theirs.items():
            parameter.grad = grads[name] * 0.5
        reference.step()
        run.step(grads, lr, step, scale=0.5)
    assert_same(run.weights(), {name: p.detach() for name, p in theirs.items()})


def test_eight_bit_moments_are_bitsandbytes_own() -> None:
    """Catches other kernels, coupled decay, another block or step than its AdamW8bit's."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    run = trained("adamw8bit", 1, steps=0)
    names = ("lined_up", "uneven", "three_rows")
    theirs = {name: nn.Parameter(random_weights()[name]) for name in names}
    reference = bitsandbytes.optim.AdamW8bit(
        theirs.values(), lr=1e-3, betas=(0.9, BETA2), weight_decay=WEIGHT_DECAY
    )
    for step in range(5):
        grads = random_grads(step)
        for name in names:
            theirs[name].grad = grads[name].clone()
        reference.step()
        run.step(grads, 1e-3, step)
    assert_same({name: p.detach() for name, p in theirs.items()}, run.weights(), names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_in_chunks_is_the_tensor_at_once(
    kind: OptimizerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a chunk with its neighbour's moments, scales or rounding, and one left out."""
    at_once = {dtype: trained(kind, 2, 3, dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(optim, "CHUNK_ON_CPU", 1024)
    for dtype, run in at_once.items():
        in_chunks = trained(kind, 2, 3, dtype)
        assert_same(in_chunks.weights(), run.weights())
        assert_same(in_chunks.saved(), run.saved())


@pytest.mark.parametrize("count", [2, 4])
def test_float_moments_do_not_know_the_ranks(count: int) -> None:
    """Catches decay or moments that depend on the rows a rank holds, an empty one included."""
    alone, cut = trained("adamw", 1, 10).weights(), trained("adamw", count, 10).weights()
    for name in alone:
        torch.testing.assert_close(cut[name], alone[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [2, 4])
def test_eight_bit_moments_hardly_know_the_ranks(count: int) -> None:
    """Catches blocks counted from a rank's first row, which differ all over a tensor.

    Only blocks that a rank's end cuts may differ, by less than 8 bits differ from float32.
    """
    start, floating = random_weights(), trained("adamw", 1, 10).weights()
    alone, cut = trained("adamw8bit", 1, 10).weights(), trained("adamw8bit", count, 10).weights()
    assert_same(cut, alone, SAME_ON_ALL_RANKS)
    differs = (cut["uneven"] != alone["uneven"]).view(-1)
    rows = -(-97 // count)
    ends = {rank * rows * 65 // 256 for rank in range(1, count)}
    assert set(torch.nonzero(differs).div(256, rounding_mode="floor").view(-1).tolist()) <= ends
    by_ranks = rms(cut["uneven"] - alone["uneven"])
    by_quantising = rms(alone["uneven"] - floating["uneven"])
    distance = rms(floating["uneven"] - start["uneven"])
    print(
        f"\n8-bit on {count} ranks: {by_ranks / distance:.1e} of the distance moved from one rank "
        f"where a block is cut, else equal; {by_quantising / distance:.1e} from float32"
    )
    assert 0 < by_ranks < by_quantising < 0.1 * rms(floating["uneven"] - start["uneven"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_which_moments_are_8_bit_is_the_whole_tensors_matter(count: int) -> None:
    """Catches small shards of a large tensor that fall back to float32."""
    for optimizer in trained("adamw8bit", count, 0).optimizers:
        states = optimizer.state_tensors()
        for name, value in random_weights().items():
            dtype = torch.uint8 if value.numel() >= 4096 else torch.float32
            assert states[f"optimizer.exp_avg.{name}"].dtype == dtype, name
            assert states[f"optimizer.exp_avg_sq.{name}"].dtype == dtype, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_states_come_back_bit_for_bit(kind: OptimizerKind, dtype: torch.dtype, count: int) -> None:
    """Catches a state, a scale or a step number that a checkpoint forgets."""
    run = trained(kind, count, 4, dtype)
    resumed = CutRun(run.weights(), kind, count)
    resumed.load(run)
    for step in range(4, 7):
        run.step(random_grads(step), 1e-3, step)
        resumed.step(random_grads(step), 1e-3, step)
    assert_same(resumed.weights(), run.weights())
    assert_same(resumed.saved(), run.saved())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (1, 4), (4, 2), (4, 1)])
def test_states_travel_to_other_ranks(before: int, after: int) -> None:
    """Catches scales of the wrong shard's blocks, and blocks quantised anew without need."""
    floating, run = trained("adamw", before, 5), trained("adamw8bit", before, 5)
    resumed = {
        kind: CutRun(r.weights(), kind, after)
        for kind, r in zip(KINDS, (floating, run), strict=True)
    }
    resumed["adamw"].load(floating)
    assert_same(resumed["adamw"].saved(), floating.saved())
    resumed["adamw8bit"].load(run)
    for step in range(5, 10):
        for each in (floating, run, resumed["adamw8bit"]):
            each.step(random_grads(step), 1e-3, step)
    here, there = resumed["adamw8bit"].weights(), run.weights()
    assert_same(here, there, SAME_ON_ALL_RANKS)
    by_travel = rms(here["uneven"] - there["uneven"])
    assert 0 < by_travel < rms(there["uneven"] - floating.weights()["uneven"])


def test_bfloat16_masters_do_not_know_the_ranks() -> None:
    """Catches rounding noise by a rank's own rows, and noise that repeats over steps."""
    alone = trained("adamw", 1, 5, torch.bfloat16).weights()
    for count in (2, 4):
        cut = trained("adamw", count, 5, torch.bfloat16).weights()
        for name in alone:
            share = (cut[name] != alone[name]).float().mean()
            assert share < 1e-3, "float rounding tips a few over"


def test_small_updates_reach_bfloat16_masters() -> None:
    """Catches weights that stand still at the paper's learning rate, or drift by rounding."""
    generator = torch.Generator().manual_seed(3)
    shape, steps, lr = (128, 256), 200, 5e-6
    start = (torch.rand(shape, generator=generator) * 0.015 + 0.015).to(torch.bfloat16)
    start *= torch.randn(shape, generator=generator).sign()
    direction = torch.randn(shape, generator=generator).sign()
    wide = CutRun({"w": start.float()}, "adamw", 1, weight_decay=0.0)
    narrow = CutRun({"w": start}, "adamw", 1, weight_decay=0.0)
    nearest = nn.Parameter(start.clone())
    lossy = torch.optim.AdamW([nearest], lr=lr, weight_decay=0.0)
    for step in range(steps):
        grad = direction * (0.5 + torch.rand(shape, generator=generator))
        grad = grad.to(torch.bfloat16)
        wide.step({"w": grad}, lr, step)
        narrow.step({"w": grad}, lr, step)
        nearest.grad = grad
        lossy.step()
    moved, expected = (
        ((run.weights()["w"].double() - start.double()) * -direction).flatten()
        for run in (narrow, wide)
    )
    print(
        f"\nbfloat16 masters moved {moved.mean():.3e} in the mean, float32 ones "
        f"{expected.mean():.3e}; {(moved != 0).float().mean():.2%} of the weights moved, rounded "
        f"to nearest {(nearest != start).float().mean():.2%}"
    )
    assert (nearest != start).float().mean() < 0.01, "what plain bfloat16 would do"
    assert (moved != 0).float().mean() > 0.99
    error = moved - expected
    standard_error = error.std() / math.sqrt(error.numel())
    assert standard_error < 0.01 * expected.mean()
    assert abs(error.mean()) < 4 * standard_error


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_a_gradient_rests(kind: OptimizerKind) -> None:
    """Catches decay of, or a step counted for, what a batch did not touch."""
    run = trained(kind, 2, 1)
    before = run.weights()
    grads = random_grads(1)
    left_out = grads.pop("lined_up")
    run.step(grads, 1e-3, 1)
    assert torch.equal(run.weights()["lined_up"], before["lined_up"])
    facts = json.loads(json.dumps(run.optimizers[0].state_facts()))
    assert facts["num_updates"]["lined_up"] == 1
    assert facts["num_updates"]["gain"] == 2
    late, at_once = run, trained(kind, 2, 1)
    late.step({"lined_up": left_out}, 1e-3, 2)
    at_once.step({"lined_up": left_out}, 1e-3, 1)
    assert torch.equal(late.weights()["lined_up"], at_once.weights()["lined_up"])


def test_a_tied_table_is_updated_once() -> None:
    """Catches a parameter that counts twice where the head shares it."""
    model = tiny_model("llama", tie_word_embeddings=True)
    shards = local_shards(model)
    optimizer = ShardedAdamW(shards, "adamw", 0.0, BETA2, seed=0)
    before = model.embed_tokens.weight.detach().clone()
    model(torch.arange(8).view(1, 8)).square().sum().backward()
    moving = model.embed_tokens.weight.grad != 0
    optimizer.step(1e-3, 0)
    moved = (model.embed_tokens.weight - before).abs()[moving]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-2, atol=1e-6)
    assert [name for name in optimizer.state_facts()["num_updates"] if "lm_head" in name] == []


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fall back to other moments than were asked for, and a traceback."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    check_optimizer("adamw")
    with pytest.raises(UserError, match=r"^--optimizer adamw8bit: .* pip install bitsandbytes"):
        check_optimizer("adamw8bit")
    with pytest.raises(UserError, match="bitsandbytes cannot be imported"):
        trained("adamw8bit", 1, 0)


def test_nothing_is_said_on_import() -> None:
    """Catches a warning about kernels that nothing here uses, before every run."""
    done = run_python("-c", "from cfs.train import optim; optim.check_optimizer('adamw8bit')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_ranks(tmp_path: Path) -> None:
    """Catches states that torch's checkpoints cannot cut anew, and updates lost to FSDP.

    Four ranks in two copies go on from two ranks' checkpoint as those do, bit for bit; a lone
    process does within float rounding, or what 8 bits cost.
    """
    two, four, resumed, alone = (tmp_path / n for n in ("two", "four", "resumed", "alone"))
    for path in (two, four, resumed, alone):
        path.mkdir()

    def run_ranks(ranks: int, *arguments: object) -> None:
        done = run_python("-m", "tests.train.optim_steps", *map(str, arguments), ranks=ranks)
        assert done.returncode == 0, done.stderr

    run_ranks(2, two, two, 2, 0, 3, 6)
    run_ranks(4, two, four, 2, 3, 6)
    start = dict(tiny_model("llama", hidden_size=64, tie_word_embeddings=True).named_parameters())
    for case in CASES:
        take_steps(case, two, resumed, ALONE, 1, [3, 6])
        take_steps(case, alone, alone, ALONE, 1, [0, 6])
        sharded, hybrid, travelled, whole = (
            load_file(path / f"{case}-6.safetensors") for path in (two, four, resumed, alone)
        )
        assert_same(hybrid, sharded)
        allowed = {"float": 1e-6, "eightbit": 0.02, "rounded": 0.05}[case]
        for name, value in whole.items():
            distance = rms(value - start[name].detach())
            for other in (sharded, travelled):
                assert rms(other[name].float() - value) < allowed * distance, (case, name)
