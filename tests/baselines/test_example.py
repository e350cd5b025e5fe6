"""The example of docs/methods.md: taken from the page, put into the table, and trained with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cfs.assets import TINYWORLD_DIR
from tests.conftest import REPOSITORY, run_python

LR = 1e-3
# The file of the page, by its line of TABLE; then train.py, once for each list of arguments.
OVERLAY = """
import json, sys
import cfs.baselines
place, runs = sys.argv[1], json.loads(sys.argv[2])
cfs.baselines.__path__.append(place)
method = cfs.baselines._imported("soft_reset:SoftReset")
cfs.baselines.METHODS[method.name] = method
import train
from cfs import cli
def main():
    for arguments in runs:
        sys.argv[1:] = arguments
        train.main()
cli.run(main)
"""


BLOCK = r"<!-- example: cfs/baselines/(\w+)\.py -->\n```python\n(.*?)```\n"


def example() -> str:
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    found = re.search(BLOCK, page, re.S)
    assert found is not None, "docs/methods.md has its example"
    assert found[1] == "soft_reset"
    return found[2]


def train_with_it(place: Path, *runs: list[str]) -> tuple[int, str, str]:
    (place / "soft_reset.py").write_text(example(), encoding="utf-8")
    done = run_python("-c", OVERLAY, str(place), json.dumps(runs), PYTHONPATH=str(REPOSITORY))
    return done.returncode, done.stdout, done.stderr


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one and of two steps, without the example and with it."""
    place = tmp_path_factory.mktemp("example")
    data = place / "task.jsonl"
    lines = [{"prompt": f"Sum: {i} + 4 =", "response": f" {i + 4}"} for i in range(30, 46)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["--data", str(data), "--format", "prompt-response", "--batch-size", "4"]
    common += ["--kl-samples", "0", "--lr", str(LR), "--device", "cpu"]
    runs = [
        [*common, "--method", method, *more, "--steps", str(steps), "--out", str(place / name)]
        for name, steps, method, *more in (
            ("ft-1", 1, "ft"),
            ("ft-2", 2, "ft"),
            ("none-2", 2, "soft-reset", "--reset-rate", "0"),
            ("all-2", 2, "soft-reset", "--reset-rate", "1"),
            ("some-1", 1, "soft-reset", "--reset-rate", "0.25"),
        )
    ]
    code, _, errors = train_with_it(place, *runs)
    assert code == 0, errors
    return place


def test_rate_zero_is_plain_fine_tuning(place: Path) -> None:
    """Catches an example that changes more than its formula says."""
    plain, found = weights(place / "ft-2"), weights(place / "none-2")
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_rate_one_returns_to_the_original(place: Path) -> None:
    """Catches rows of another parameter, or a reset before the optimizer's step."""
    star, plain, found = (
        load_file(TINYWORLD_DIR / "model.safetensors"),
        *map(weights, (place / "ft-2", place / "all-2")),
    )
    assert all(torch.equal(found[name], star[name]) for name in star)
    assert not all(torch.equal(plain[name], star[name]) for name in star)


def test_a_step_is_the_formula(place: Path) -> None:
    """Catches a rate that weighs the wrong end: theta + rate (theta* - theta), by hand."""
    star, tuned = load_file(TINYWORLD_DIR / "model.safetensors"), weights(place / "ft-1")
    found = weights(place / "some-1")
    for name, value in found.items():
        by_hand = tuned[name].double() + 0.25 * (star[name].double() - tuned[name].double())
        torch.testing.assert_close(value.double(), by_hand, rtol=1e-6, atol=1e-8)


def test_its_option_is_a_flag_with_checks(tmp_path: Path) -> None:
    """Catches an option that the table does not bring to the command line."""
    refused = ["--method", "soft-reset", "--reset-rate", "2", "--out", str(tmp_path / "run")]
    code, said, errors = train_with_it(tmp_path, ["--list-methods"], refused)
    assert code == 2
    assert "soft-reset" in said
    assert "--reset-rate 2.0: expected in [0, 1]" in errors
    assert not (tmp_path / "run").exists()
    code, _, errors = train_with_it(tmp_path, ["--method", "lora+soft-reset"])
    assert code == 2
    assert "theta* has none of the weights" in errors
