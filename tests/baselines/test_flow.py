"""FLOW's weights: what they are, which example gets which, and what they do to the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cfs.baselines.flow import Flow, easy_sample_weights
from cfs.data.formats import Example
from cfs.data.mixture import Mixture, Source
from cfs.errors import UserError
from cfs.model import Decoder, load_model
from cfs.train.config import TrainConfig
from cfs.train.loop import train
from cfs.train.sources import mean_nlls, weighted
from tests.conftest import ALONE, read_metrics, tiny_model
from tests.train.runs import base_model, make_run, random_examples


def target_nlls(model: Decoder, example: Example) -> np.ndarray:
    """(num_targets,) float64, -log p of each target, from all logits at once."""
    ids = torch.from_numpy(example.input_ids)
    with torch.no_grad():
        logprobs = model(ids[None])[0].double().log_softmax(-1)
    places = torch.from_numpy(example.target_mask).nonzero().squeeze(1)
    return -logprobs[places - 1, ids[places]].numpy()


@pytest.mark.parametrize(
    ("nlls", "temperature", "exponents"),
    [
        ([1.0, 2.0, 4.0], 1.0, [0.5, 1.0, 2.0]),
        ([4.0, 1.0, 2.0], 2.0, [1.0, 0.25, 0.5]),
        ([1.0, 3.0], 1.0, [0.5, 1.5]),  # of two in the middle the mean: 2
        ([0.0, 2.0, 100.0], 1.0, [0.0, 1.0, 50.0]),
    ],
)
def test_weights_by_hand(nlls: list[float], temperature: float, exponents: list[float]) -> None:
    """Catches the mean for tau, its inverse, a sign, weights that are normalised or sorted, and
    anything but 1 for an example that theta* is certain of."""
    found = easy_sample_weights(np.array(nlls), temperature)
    np.testing.assert_allclose(found, np.exp(-np.array(exponents)), rtol=1e-15)


def test_a_median_of_zero_makes_no_nan() -> None:
    """Catches 0 / 0 where theta* is certain of most of the task: the limits are 0 and 1."""
    with np.errstate(all="raise"):
        found = easy_sample_weights(np.array([0.0, 3.0, 0.0, 0.0]))
    assert found.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_the_option_reaches_the_weights() -> None:
    """Catches `--flow-temperature` read by nobody."""
    (method,) = TrainConfig(method="flow", flow_temperature=4.0).methods
    found = method.example_weights(np.array([1.0, 2.0, 3.0]))
    assert found is not None
    assert found[1] == pytest.approx(np.exp(-1 / 4))
    with pytest.raises(UserError, match=r"--flow-temperature 0\.0: expected above 0"):
        Flow(flow_temperature=0.0).check()


def test_each_example_of_several_sources_gets_its_own_mean() -> None:
    """Catches sums in place of means, prompts counted in, and the order in which the examples were
    packed, by length and over micro-batches, taken for the order in which they stand."""
    model = tiny_model()
    sources = [
        Source("one.jsonl record", random_examples(9, 11, first_target=4), per_epoch=3),
        Source("two.jsonl record", random_examples(5, 12, first_target=1), per_epoch=11),
    ]
    config = TrainConfig(method="flow", micro_batch_tokens=40)
    found = mean_nlls(model, sources, config, ALONE)
    for source, means in zip(sources, found, strict=True):
        assert means.dtype == np.float64
        expected = [target_nlls(model, example).mean() for example in source.examples]
        np.testing.assert_allclose(means, expected, rtol=1e-5)


def test_weights_stay_with_their_examples_through_every_epoch() -> None:
    """Catches the weights of one source given to the next, or read by a draw's place in its epoch
    where an interleaved source is walked through in passes of its own."""
    sources = [
        Source("one", random_examples(4, 1, 4), per_epoch=3),
        Source("two", random_examples(3, 2, 4), per_epoch=5),
        Source("three", random_examples(2, 3, 4)),
    ]
    given = np.arange(1.0, 10.0)
    expected = {("one", i): i for i in range(1, 5)}
    expected |= {("two", i): 4 + i for i in range(1, 4)}
    expected |= {("three", i): 7 + i for i in range(1, 3)}
    sample = Source("sample", random_examples(2, 4, 1), synthetic=True)
    mixture = Mixture([*weighted(sources, given), sample], batch_size=12, seed=5)
    draws = [draw for step in range(8) for draw in mixture.batch(step)]
    seen = {}
    for draw in draws:
        assert draw.weight == expected.get((draw.source, draw.example.number), 1.0)
        seen[draw.source, draw.example.number] = draw.weight
    assert expected.items() <= seen.items(), "every example was met"


def test_the_loss_of_a_step_by_hand(tmp_path: Path) -> None:
    """Catches a division by the sum of weights, weights on samples of theta*, weights that change
    what is counted, and weights of micro-batches in another order than their targets."""
    task, samples = random_examples(8, 1, 4), random_examples(8, 2, 1)
    given = np.linspace(0.1, 0.9, 8)
    lines = {}
    for name, weights in (("flow", given), ("plain", None)):
        run = make_run(tmp_path, name, method="flow+cfs", l2=None, steps=1, lam=0.5)
        tasks = [Source("task", task, weights=weights)]
        synthetic = Source("sample", samples, synthetic=True)
        run.mixture = Mixture([*tasks, synthetic], batch_size=16, seed=0)  # all of them at once
        train(run)
        lines[name] = read_metrics(tmp_path / name)[1]
    base = load_model(base_model(tmp_path))
    nlls = [target_nlls(base, example) for example in task]
    sampled = [target_nlls(base, example) for example in samples]
    count = sum(map(len, [*nlls, *sampled]))
    weighed = sum(w * nll.sum() for w, nll in zip(given, nlls, strict=True))
    expected = (weighed + 0.5 * sum(nll.sum() for nll in sampled)) / count
    assert lines["flow"]["loss"] == pytest.approx(expected, rel=1e-5)
    for key in ("targets_task", "targets_synthetic", "nll_task", "nll_synthetic"):
        assert lines["flow"][key] == lines["plain"][key], key
    assert lines["flow"]["targets_task"] == sum(map(len, nlls))
    assert lines["flow"]["nll_task"] == pytest.approx(np.concatenate(nlls).mean(), rel=1e-5)


def test_equal_weights_scale_the_tasks_gradient(tmp_path: Path) -> None:
    """Catches weights that reach the reported loss and not the gradient."""
    task = random_examples(8, 1, 4)
    norms = []
    for name, weight in (("whole", 1.0), ("quarter", 0.25)):
        run = make_run(tmp_path, name, method="flow", l2=None, steps=1)
        sources = [Source("task", task, weights=np.full(8, weight))]
        run.mixture = Mixture(sources, batch_size=8, seed=0)
        train(run)
        norms.append(read_metrics(tmp_path / name)[1]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-5)
