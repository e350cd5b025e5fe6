"""Which methods go together, and what is said where they do not."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from cfs.baselines import METHODS, Method, parsed
from cfs.errors import UserError
from cfs.train.config import TrainConfig
from tests.conftest import REPOSITORY

ACCEPTED = [
    "l2+cfs",
    "flow+cfs",
    "lora+cfs",
    "mofo+cfs",
    "distill+cfs",
    "wise-ft+cfs",
    "cfs+replay",
    "ewc+cfs",
    "freeze+cfs",
    "sfa+cfs",
    "hma+cfs",
    "wise-ft+lota",
    "l2+ewc",
    "lota+l2-init",
]
REFUSED = {
    "ft+cfs": "ft goes alone (every other method is plain fine-tuning",
    "pretrain+cfs": "pretrain goes alone (it starts from random weights",
    "lora+l2": "lora and l2 (LoRA leaves the weights themselves as they are",
    "lora+mofo": "lora and mofo (LoRA leaves the weights themselves as they are",
    "mofo+lota": "both decide the update: mofo moves only the entries",
    "wise-ft+task-arithmetic": "both decide the merge: wise-ft averages with theta*",
    "cfs+cfs": "names cfs twice",
    "magic+cfs": "'magic' is unknown; known: cfs, ft",
    "": "'' is unknown",
    "cfs+": "'' is unknown",
    "l2+cfs+mofo+lota": "both decide the update",
}
VALUES: dict[str, Any] = {
    "freeze": "mlp",
    "lora_alpha": 8.0,
    "lora_targets": "q_proj",
    "wise_alpha": [0.25],
    "task_scale": [0.25],
}
"""What an option is given, where half or twice its default is no value for it."""


def said(combination: str) -> str | None:
    """The refusal's message; None where the combination is accepted."""
    try:
        parsed(combination)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("combination", ACCEPTED)
def test_what_goes_together(combination: str) -> None:
    """Catches an exclusion too many: the paper's Table 8 joins lora and cfs, for one."""
    found = [method.name for method in TrainConfig(method=combination).methods]
    assert sorted(found) == sorted(combination.split("+"))


def test_what_chooses_among_gradients_comes_last() -> None:
    """Catches an order of names by which a penalty adds to entries that lota has frozen."""
    for combination in ("lota+l2-init+sfa", "l2-init+sfa+lota", "mofo+ewc", "ewc+mofo"):
        found = TrainConfig(method=combination).methods
        assert found[-1].name in ("lota", "mofo")


@pytest.mark.parametrize("combination", REFUSED)
def test_what_does_not(combination: str) -> None:
    """Catches two methods of which one would silently undo the other."""
    with pytest.raises(UserError, match=re.escape(REFUSED[combination])) as refusal:
        TrainConfig(method=combination)
    assert f"--method {combination}" in str(refusal.value).replace("'", "")
    assert "\n" not in str(refusal.value)


def test_every_pair_is_accepted_or_refused_with_a_reason() -> None:
    """Catches a crash, a refusal that hangs on the order, and one that names one method alone."""
    for one, other in itertools.combinations(METHODS, 2):
        first, second = said(f"{one}+{other}"), said(f"{other}+{one}")
        assert (first is None) == (second is None), f"{one} and {other}"
        if first is None or second is None:
            continue
        combination, _, reason = first.partition(": ")
        assert combination == f"--method {one}+{other}"
        assert one in reason or other in reason
        assert re.search(r"\(\w.+\)$|both decide .+: .+, .+", reason), first
        if METHODS[one].alone and METHODS[other].alone:  # the first that is named says why
            continue
        assert sorted(re.findall(r"[\w*-]+", first)) == sorted(re.findall(r"[\w*-]+", second))


def test_a_pair_that_is_refused_is_refused_among_others() -> None:
    """Catches combinations of three in which only neighbours are compared."""
    for one, other in itertools.permutations(METHODS, 2):
        between = next(n for n in ("cfs", "replay", "cs") if n not in (one, other))
        alone = {METHODS[one].alone, METHODS[other].alone} != {None}
        if not alone:
            assert (said(f"{one}+{between}+{other}") is None) == (said(f"{one}+{other}") is None)


def test_what_is_excluded_exists() -> None:
    """Catches the name of a method that was renamed, which would exclude nothing."""
    for method in METHODS.values():
        assert method.excludes.keys() <= METHODS.keys(), method.name
        assert method.name not in method.excludes


def test_each_option_is_of_one_method() -> None:
    """Catches two methods with a flag of one name, of which one would never get its value."""
    names = [its.name for method in METHODS.values() for its in method.options()]
    assert len(names) == len(set(names))
    own = {f for f in TrainConfig.__annotations__ if not f.startswith("_")}
    assert own.isdisjoint(names), "a method's option hides a flag of every run"


def all_options() -> list[tuple[str, Any]]:
    return [(method.name, its) for method in METHODS.values() for its in method.options()]


def value_for(its: Any) -> Any:
    if its.name in VALUES:
        return VALUES[its.name]
    if its.default is None or isinstance(its.default, str):
        return "given"
    return 2 * its.default if isinstance(its.default, int) else its.default / 2


@pytest.mark.parametrize("chosen", METHODS)
def test_options_of_methods_that_take_no_part_are_refused(chosen: str) -> None:
    """Catches a flag that is read by nobody, and a remedy that is refused in its turn."""
    for owner, its in all_options():
        flag = f"--{its.name.replace('_', '-')}"
        if owner == chosen or its.name == "l2":  # --l2 joins by itself (test_l2.py)
            continue
        with pytest.raises(
            UserError, match=f"^{flag} .*has no {owner}; leave the flag out"
        ) as told:
            TrainConfig(method=chosen, **{its.name: value_for(its)})
        remedy = re.search(r"use --method (\S+)$", str(told.value))
        joined = owner if chosen == "ft" else f"{chosen}+{owner}"
        assert (remedy is not None) == (said(joined) is None)
        if remedy is not None:
            assert remedy[1] == joined


@pytest.mark.parametrize("name", METHODS)
def test_an_option_reaches_its_method(name: str) -> None:
    """Catches an option that the command line takes and the method never sees."""
    for owner, its in all_options():
        if owner == name:
            value = value_for(its)
            (method,) = TrainConfig(method=name, **{its.name: value}).methods
            assert getattr(method, its.name) == value != its.default


def test_samples_given_to_ssr_are_refused() -> None:
    """Catches `--synthetic` ignored: ssr draws two corpora, and neither is the one given."""
    with pytest.raises(UserError, match="--synthetic: ssr draws two corpora"):
        TrainConfig(method="ssr", synthetic="corpus")


@pytest.mark.parametrize("method", ["hma+task-arithmetic", "task-arithmetic+hma"])
def test_several_models_go_to_the_method_that_merges(method: str) -> None:
    """Catches a refusal that hangs on which of two methods that need a model is named first."""
    assert TrainConfig(method=method, tuned=["a", "b"]).tuned == ["a", "b"]
    with pytest.raises(UserError, match="--tuned: 2 models; hma takes one"):
        TrainConfig(method="hma", tuned=["a", "b"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    """Catches a method that `--list-methods` or the table of sources would show as a blank."""
    method: type[Method] = METHODS[name]
    assert method.name == name
    assert method.__doc__
    assert 10 < len(method.summary) < 100
    assert "\n" not in method.summary
    assert re.search(r"\d{4}|the paper", method.source)
    for its in method.options():
        assert its.metadata["help"], its.name


def test_every_method_is_documented() -> None:
    """Catches a method that the guide forgot."""
    guide = REPOSITORY / "docs" / "methods.md"
    if not guide.is_file():
        pytest.skip("docs/methods.md is not there yet")
    headings = re.findall(r"^### `([^`]+)`", guide.read_text(encoding="utf-8"), re.MULTILINE)
    assert METHODS.keys() <= set(headings)
    assert set(headings) <= METHODS.keys(), "it speaks of a method that there is not"
