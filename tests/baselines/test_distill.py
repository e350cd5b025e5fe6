"""The options of distill; tests/model/test_kl_head.py has its loss."""

from __future__ import annotations

import pytest

from cfs.baselines.distill import Distill
from cfs.errors import UserError


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["distill", "distill_temperature"])
def test_options_out_of_range(option: str, value: float) -> None:
    """Catches a run without the KL, or with NaN, that says nothing."""
    flag = option.replace("_", "-")
    with pytest.raises(UserError, match=f"^--{flag} {value}: expected a number above 0$"):
        Distill(**{option: value}).check()
    Distill().check()
