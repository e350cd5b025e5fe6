"""metrics.jsonl over a resumption, loggers by flag, and what counts as work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cfs.data.formats import make_example
from cfs.data.mixture import Draw
from cfs.errors import UserError
from cfs.train.config import TrainConfig
from cfs.train.metrics import MetricsLog, check_loggers, step_flops
from tests.conftest import tiny_model


def log_in(path: Path, first_step: int = 0, **flags: Any) -> MetricsLog:
    return MetricsLog(path, path / "metrics.jsonl", TrainConfig(**flags), first_step)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_the_lines_of_steps_that_are_taken_again(tmp_path: Path) -> None:
    """Catches steps that stand twice, and a line that a kill cut short."""
    log = log_in(tmp_path)
    for step in range(8):
        log.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')
    log_in(tmp_path, first_step=5).write({"step": 6, "loss": 1.0})
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    log_in(tmp_path, first_step=0).write({"step": 0, "kl_nats": 0.0})
    assert steps_in(tmp_path) == [0]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    """Catches a flag that writes nothing, and None sent as a number."""
    pytest.importorskip("tensorboard")
    log = log_in(tmp_path, tensorboard=True)
    log.write({"step": 1, "loss": 2.0, "nll_synthetic": None})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert events.Scalars("loss")[0].value == 2.0


def test_wandb_gets_the_config_and_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that is not named by its directory, so that resuming begins another chart."""
    said: list[Any] = []
    tracker = SimpleNamespace(
        log=lambda values, step: said.append((step, values)), finish=lambda: said.append("end")
    )
    fake = SimpleNamespace(init=lambda **given: said.append(given) or tracker)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "run").mkdir()
    log = log_in(tmp_path / "run", wandb="forgetting")
    log.write({"step": 3, "loss": 2.0, "mfu": None})
    log.close()
    assert said[0]["project"] == "forgetting"
    assert said[0]["id"] == "run"
    assert said[0]["config"]["method"] == "cfs"
    assert said[1:] == [(3, {"loss": 2.0}), "end"]


@pytest.mark.parametrize(
    ("flags", "package"),
    [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "x"}, "wandb")],
)
def test_a_logger_that_is_not_installed_is_refused(
    flags: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that ends hours later without its charts."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install"):
        check_loggers(TrainConfig(**flags))


def test_operations_are_those_of_the_products() -> None:
    """Catches a factor of two, or prompts charged for the head; counted by torch itself."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama", num_key_value_heads=4)
    blocks = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    draws = [Draw(make_example([0] * 50, first_target=21), synthetic=False)]
    ids = torch.zeros(1, 50, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(ids, context=_NoAttention())  # type: ignore[arg-type]
        (hidden[:, 20:49] @ model.head_weight.T).sum().backward()
    counted = step_flops(model.config, blocks, draws)
    attention = 6.0 * 2 * 4 * 8 * 50**2
    assert counted - attention == pytest.approx(counter.get_total_flops())


class _NoAttention:
    position_ids = torch.arange(50)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q + k + v
