"""LoTA's mask, and what it keeps from moving."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cfs.baselines.lota import Lota
from cfs.baselines.method import Update
from cfs.errors import UserError
from tests.baselines.lockstep import lone_setting, lone_shard, train
from tests.train.cut import CutRun, CutShard, Tensors

SHAPES = {
    "embed_tokens.weight": (40, 64),
    "layers.0.input_layernorm.weight": (64,),
    "layers.0.self_attn.q_proj.weight": (97, 65),  # 8-bit moments; ranks cut blocks of them
    "layers.0.self_attn.k_norm.weight": (64,),
    "layers.0.mlp.up_proj.weight": (3, 64),  # nothing is left for the last of 4 ranks
    "lm_head.weight": (70, 64),
}
MASKED = [name for name, shape in SHAPES.items() if len(shape) == 2 and ".0." in name]
STEPS = 3


def drawn(seed: int, std: float, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).mul(std).to(dtype)
        for name, shape in SHAPES.items()
    }


def tuned_from(original: Tensors) -> Tensors:
    """A model whose MLP matrix was moved ten times as far as its attention's."""
    changes = drawn(2, 1e-3)
    changes["layers.0.mlp.up_proj.weight"] *= 10
    return {name: value.float() + changes[name] for name, value in original.items()}


def expected_mask(original: Tensors, tuned: Tensors, sparsity: float) -> dict[str, Tensor]:
    """Where training is allowed, from a sort of all differences at once."""
    distances = {name: (tuned[name].float() - original[name].float()).abs() for name in SHAPES}
    joined = torch.cat([distances[name].flatten() for name in MASKED])
    num_trained = round((1 - sparsity) * len(joined))
    threshold = joined.sort(descending=True).values[num_trained - 1]
    return {
        name: (value >= threshold) & torch.tensor(name in MASKED)
        for name, value in distances.items()
    }


def begun(
    sparsity: float, tensors: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Lota, list[CutShard]]:
    """A method that was given (theta*, tuned) by name, on one rank."""
    shards = [lone_shard(name, start) for name, (start, _) in tensors.items()]
    starts, ends = ([pair[i] for pair in tensors.values()] for i in range(2))
    method = Lota(lota_sparsity=sparsity)
    method.begin(lone_setting(shards, starts, [ends]))
    return method, shards


def test_one_threshold_serves_all_matrices() -> None:
    """Catches a share taken of each matrix, signed differences, and a mask turned over."""
    start = torch.zeros(2, 2)
    method, shards = begun(
        0.5,
        {
            "layers.0.self_attn.q_proj.weight": (start, torch.tensor([[0.4, -0.3], [0.1, 0.2]])),
            "layers.0.mlp.up_proj.weight": (start, torch.tensor([[9.0, -8.0], [0.0, 0.2]])),
            "embed_tokens.weight": (start, torch.full((2, 2), 99.0)),
        },
    )
    for shard in shards:
        shard.parameter.grad = torch.ones(2, 2)
    method.before_step(0)
    grads = [None if shard.grad is None else shard.grad.tolist() for shard in shards]
    assert grads == [[[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], None]


def test_entries_that_tie_with_the_threshold_all_train() -> None:
    """Catches an arbitrary choice among equals, of which models saved in bfloat16 have many."""
    end = torch.tensor([[1.0, -1.0], [1.0, 0.5]])
    method, (shard,) = begun(0.75, {"layers.0.mlp.up_proj.weight": (torch.zeros(2, 2), end)})
    shard.parameter.grad = torch.ones(2, 2)
    method.before_step(0)
    assert shard.parameter.grad.tolist() == [[1.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_only_the_mask_moves(kind: str, dtype: torch.dtype) -> None:
    """Catches decay or a rounding that reaches a frozen entry, and a mask on the wrong ones."""
    original = drawn(1, 0.02, dtype)
    tuned = tuned_from(original)
    grads = [drawn(10 + step, 1.0) for step in range(STEPS)]
    run = CutRun(original, kind, 1)  # type: ignore[arg-type]
    train(lambda: Lota(lota_sparsity=0.9), run, grads, 1e-2, original, tuned)
    mask = expected_mask(original, tuned, 0.9)
    assert mask["layers.0.mlp.up_proj.weight"].float().mean() > 0.5
    for name, value in run.weights().items():
        assert torch.equal(value[~mask[name]], original[name][~mask[name]]), name
        assert bool((value[mask[name]] != original[name][mask[name]]).all()), name


def test_masked_entries_take_adamws_own_steps() -> None:
    """Catches what trains being changed by the mask around it."""
    original = drawn(1, 0.02)
    tuned = tuned_from(original)
    grads = [drawn(10 + step, 1.0) for step in range(STEPS)]
    run, plain = CutRun(original, "adamw", 1), CutRun(original, "adamw", 1)
    train(lambda: Lota(lota_sparsity=0.9), run, grads, 1e-2, original, tuned)
    for step, grad in enumerate(grads):
        plain.step(grad, 1e-2, step)
    mask, expected = expected_mask(original, tuned, 0.9), plain.weights()
    for name, value in run.weights().items():
        assert torch.equal(value[mask[name]], expected[name][mask[name]]), name


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_train_the_entries_that_one_rank_trains(count: int) -> None:
    """Catches a threshold of each rank's rows, and theta* or tuned rows of another rank."""
    original = drawn(1, 0.02)
    tuned = tuned_from(original)
    grads = [drawn(10 + step, 1.0) for step in range(STEPS)]
    runs = [CutRun(original, "adamw", number) for number in (1, count)]
    for run in runs:
        train(Lota, run, grads, 1e-2, original, tuned)
    alone, cut = (run.weights() for run in runs)
    for name, value in alone.items():  # AdamW's own last bit depends on where a rank's rows end
        torch.testing.assert_close(cut[name], value, rtol=1e-6, atol=1e-8)


def test_another_methods_gradient_does_not_move_what_is_frozen() -> None:
    """Catches a combination: a penalty that adds its gradient after the mask was applied."""
    start = torch.full((2, 2), 4.0)
    method, shards = begun(
        0.5,
        {
            "layers.0.mlp.up_proj.weight": (start, torch.tensor([[5.0, 6.0], [4.0, 4.0]])),
            "lm_head.weight": (start, start + 1),
        },
    )
    for number, shard in enumerate(shards):
        weights = shard.local.fill_(7.0).view(-1)
        nothing = torch.full((4,), torch.nan)
        method.after_update(Update(number, shard, weights, start.view(-1), nothing, 0.5))
    found = [shard.local.tolist() for shard in shards]
    assert found == [[[7.0, 7.0], [4.0, 4.0]], [[4.0, 4.0], [4.0, 4.0]]]


def test_sparsity_0_trains_every_attention_and_mlp_entry() -> None:
    """Catches an entry that the first fine-tuning did not move being frozen, or refused."""
    method, (shard, head) = begun(
        0.0,
        {
            "layers.0.mlp.up_proj.weight": (torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 2.0]])),
            "lm_head.weight": (torch.zeros(1, 3), torch.ones(1, 3)),
        },
    )
    shard.parameter.grad, head.parameter.grad = torch.ones(1, 3), torch.ones(1, 3)
    method.before_step(0)
    assert shard.parameter.grad.tolist() == [[1.0, 1.0, 1.0]]
    assert head.parameter.grad is None


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_tuned_model_that_is_the_base_is_refused(sparsity: float) -> None:
    """Catches a threshold of zero, which would train everything; the head alone may differ."""
    start = torch.ones(4, 4)
    tensors = {
        "layers.0.mlp.up_proj.weight": (start, start.clone()),
        "lm_head.weight": (start, start + 1),
    }
    with pytest.raises(UserError, match=r"--tuned: .* equal those of --model"):
        begun(sparsity, tensors)


def test_a_tuned_model_that_moved_less_than_is_to_train_is_refused() -> None:
    """Catches the same threshold of zero where a bfloat16 model has lost small changes."""
    start = torch.zeros(1, 10)
    end = start.clone()
    end[0, 0] = 1.0
    with pytest.raises(UserError, match=r"--lota-sparsity 0\.5: of 10 .* than the 1 that differ"):
        begun(0.5, {"layers.0.mlp.up_proj.weight": (start, end)})


def test_several_tuned_models_are_refused() -> None:
    """Catches a mask from the first of them alone."""
    shard = lone_shard("layers.0.mlp.up_proj.weight", torch.zeros(2, 2))
    rows = [torch.ones(2, 2)]
    with pytest.raises(UserError, match=r"--tuned: .* one fine-tuned model, got 2"):
        Lota().begin(lone_setting([shard], rows, [rows, rows]))


def test_a_run_that_freezes_all_matrices_is_refused() -> None:
    """Catches freeze+lota with nothing left to draw a mask over."""
    with pytest.raises(UserError, match="--method: lota trains attention and MLP matrices"):
        begun(0.5, {"lm_head.weight": (torch.zeros(2, 2), torch.ones(2, 2))})


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    """Catches a run that would train nothing."""
    with pytest.raises(UserError, match=r"--lota-sparsity .* in \[0, 1\)"):
        Lota(lota_sparsity=sparsity).check()
