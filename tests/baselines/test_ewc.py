"""The Fisher information of p_theta*, estimated and exact, and the penalty that it weighs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cfs.baselines.ewc import EWC, GROUP_SIZE, add_squares
from cfs.baselines.method import Setting
from cfs.data.formats import Example, make_example
from cfs.errors import UserError
from cfs.train.config import TrainConfig
from cfs.train.fisher import fisher_information
from cfs.train.loop import train
from cfs.train.parallel import LocalShard, local_shards
from tests.baselines.lockstep import lone_shard
from tests.conftest import ALONE, tiny_model
from tests.train.runs import make_run, random_examples, same, weights

VOCAB, LONGEST = 3, 2
"""Of the pocket model: token 0 begins and ends its strings of at most two tokens after it."""
CONFIG = TrainConfig(method="ewc", micro_batch_tokens=32)


def test_with_fisher_information_1_it_is_l2_bit_for_bit(tmp_path: Path) -> None:
    """Catches another factor than l2's, such as Kirkpatrick's half, and another anchor."""
    ewc = make_run(tmp_path, "ewc", method="ewc", l2=None, ewc=0.5, fisher_samples=16, steps=4)
    (method,) = ewc.methods
    assert isinstance(method, EWC)
    assert any(not torch.equal(f, torch.ones_like(f)) for f in method.fisher)
    for fisher in method.fisher:
        fisher.fill_(1.0)
    l2 = make_run(tmp_path, "l2", method="l2", l2=0.5, steps=4)
    train(ewc)
    train(l2)
    assert same(weights(ewc), weights(l2))


def test_squares_by_hand() -> None:
    """Catches a mean over groups in place of samples, a sum squared over groups, and gradients
    left for the first step."""
    shards = [lone_shard("a", torch.zeros(2)), lone_shard("b", torch.zeros(1))]
    fisher = [torch.zeros(2), torch.zeros(1)]
    shards[0].parameter.grad = torch.tensor([3.0, -4.0])  # b has none
    add_squares(fisher, shards, num_samples=16)
    assert all(shard.parameter.grad is None for shard in shards)
    shards[0].parameter.grad, shards[1].parameter.grad = torch.tensor([1.0, 2.0]), torch.ones(1)
    add_squares(fisher, shards, num_samples=16)
    assert [f.tolist() for f in fisher] == [[(9 + 1) / 16, (16 + 4) / 16], [1 / 16]]


def test_a_models_fisher_information_is_of_groups_of_samples() -> None:
    """Catches gradients squared by micro-batch or by token, means in place of sums, prompts or
    padding that count, and groups of another size than the estimate is divided for."""
    model = tiny_model("llama", tie_word_embeddings=True)
    samples = random_examples(2 * GROUP_SIZE, 5, first_target=1)
    shards = local_shards(model)
    found = fisher_information(model, shards, samples, CONFIG, ALONE)
    assert all(p.grad is None for p in model.parameters())
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for group in (samples[:GROUP_SIZE], samples[GROUP_SIZE:]):
        sums = [torch.zeros_like(total) for total in expected]
        for sample in group:
            ids = torch.from_numpy(sample.input_ids)
            logprobs = model(ids[None])[0, :-1].log_softmax(-1)
            score = logprobs.gather(1, ids[1:, None]).sum()
            for total, grad in zip(
                sums, torch.autograd.grad(score, list(model.parameters())), strict=True
            ):
                total += grad.double()
        for total, grad in zip(expected, sums, strict=True):
            total += grad.square() / len(samples)
    for fisher, wanted, shard in zip(found, expected, shards, strict=True):
        assert fisher.dtype == torch.float32
        assert float((fisher - wanted).norm() / wanted.norm()) < 1e-5, shard.name


class Pocket(nn.Module):
    """p(x_t | x_{t-1}) by a table of logits, in float64, with the interface that the loss asks."""

    packed_route = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.table = nn.Parameter(
            torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=generator)
        )

    def forward(self, input_ids: Tensor, target_mask: Tensor, **_: object) -> Tensor:
        places = target_mask.flatten().nonzero().squeeze(1)
        ids = input_ids.flatten()
        return self.table.log_softmax(-1)[ids[places - 1], ids[places]]

    def logprob(self, sample: Example) -> Tensor:
        """log p(x), with a graph."""
        ids, mask = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.target_mask)
        return self(ids, mask).sum()


def all_strings() -> list[Example]:
    """Every text that the pocket model can write."""
    inner = range(1, VOCAB)
    ended = [
        [0, *ids, 0] for length in range(LONGEST) for ids in itertools.product(inner, repeat=length)
    ]
    cut = [
        [0, *ids, last] for ids in itertools.product(inner, repeat=LONGEST - 1) for last in inner
    ]
    return [make_example(ids, 1) for ids in [*ended, *cut]]


def probabilities_and_scores(model: Pocket) -> tuple[Tensor, Tensor]:
    """Of every string: p (X,), and the gradient of log p by the table (X, V * V); float64."""
    logprobs = [model.logprob(sample) for sample in all_strings()]
    scores = [torch.autograd.grad(logprob, model.table)[0].flatten() for logprob in logprobs]
    return torch.stack(logprobs).detach().exp(), torch.stack(scores)


def exact_fisher(model: Pocket) -> Tensor:
    """(V * V,) E[(d log p(x))^2], by the definition."""
    probabilities, scores = probabilities_and_scores(model)
    return probabilities @ scores.square()


def test_the_pocket_model_can_be_enumerated() -> None:
    """Catches a string forgotten or doubled in the oracle of the tests below."""
    probabilities, scores = probabilities_and_scores(Pocket())
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float((probabilities @ scores).abs().max()) < 1e-12, "scores have mean zero"


def test_a_group_counts_as_the_square_of_its_sum() -> None:
    """Catches a string that counts once where a group has it twice; the law below needs this."""
    model, strings = Pocket(), all_strings()
    places = [0, 1, 1, 4, 6, 6, 6, 2]
    shards = [LocalShard("table", model.table)]
    group = [strings[i] for i in places]
    (found,) = fisher_information(model, shards, group, CONFIG, ALONE)  # type: ignore[arg-type]
    _, scores = probabilities_and_scores(model)
    expected = scores[places].sum(0).square() / GROUP_SIZE
    torch.testing.assert_close(found.double().flatten(), expected, rtol=1e-6, atol=1e-9)


def test_groups_are_unbiased_for_the_exact_fisher_information() -> None:
    """Catches a bias of grouped squares: their exact mean, over every group of 8 that can be drawn.

    It is G F / G only because scores of samples of the model have mean zero.
    """
    probabilities, scores = probabilities_and_scores(model := Pocket())
    num_strings = len(probabilities)
    mean = torch.zeros(VOCAB * VOCAB, dtype=torch.float64)
    shard, total = lone_shard("table", torch.zeros(VOCAB * VOCAB)), 0.0
    for bars in itertools.combinations(range(GROUP_SIZE + num_strings - 1), num_strings - 1):
        # Stars and bars: how often each string is in the group.
        counts = np.diff([-1, *bars, GROUP_SIZE + num_strings - 1]) - 1
        chance = math.factorial(GROUP_SIZE) / math.prod(map(math.factorial, counts.tolist()))
        chance *= float(np.prod(probabilities.numpy() ** counts))
        shard.parameter.grad = (torch.from_numpy(counts).double() @ scores).float()
        fisher = [torch.zeros(VOCAB * VOCAB)]
        add_squares(fisher, [shard], GROUP_SIZE)
        mean += chance * fisher[0]
        total += chance
    assert total == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(mean, exact_fisher(model), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("entry", [(0, 0), (0, 2), (1, 1), (2, 0)])
def test_half_of_it_approximates_the_exact_kl(entry: tuple[int, int]) -> None:
    """Catches a Fisher information per token, or a factor of two between penalty and KL.

    The KL of softmaxes differs from its second order by a share of at most delta / 3.
    """
    model = Pocket()
    start, fisher = model.table.detach().clone(), exact_fisher(model).view(VOCAB, VOCAB).float()
    probabilities, _ = probabilities_and_scores(model)
    for delta in (0.2, 0.05, 0.0125):
        with torch.no_grad():
            model.table.copy_(start)[entry] += delta
        moved = torch.stack([model.logprob(sample) for sample in all_strings()]).detach()
        exact_kl = float(probabilities @ (probabilities.log() - moved))
        method = EWC(ewc=0.5)
        shards = [LocalShard("table", model.table)]
        method.begin(Setting(shards, [start], [], [], lambda values: values, 1, [fisher]))
        penalty = method.before_step(0)
        assert penalty is not None
        assert float(penalty) == pytest.approx(exact_kl, rel=delta / 2)
        model.table.grad = None


@pytest.mark.parametrize("count", [0, GROUP_SIZE - 1, GROUP_SIZE + 1])
def test_a_number_of_samples_that_is_no_whole_number_of_groups_is_refused(count: int) -> None:
    """Catches a last group of fewer samples, whose square would count for less."""
    with pytest.raises(UserError, match=rf"--fisher-samples {count}: expected a multiple of 8"):
        EWC(fisher_samples=count).check()
