"""The gate's arithmetic, by hand."""

import math
from types import SimpleNamespace

import pytest

from lewis.errors import InputError
from lewis.gate import Verdict, decide

KEY = "gsm8k/exact_match,none"


def gate(min_gain: float = 0.0, metric: str = KEY) -> SimpleNamespace:
    return SimpleNamespace(metric=metric, min_gain=min_gain)


def test_no_gate_passes() -> None:
    assert decide(None, {}, {}, "base") == Verdict(True, ("no gate in the recipe",), "base")


@pytest.mark.parametrize(
    ("new", "old", "min_gain", "passed"),
    [
        (0.5, 0.5, 0.0, True),
        (0.4999, 0.5, 0.0, False),
        (0.57, 0.55, 0.02, True),  # 0.57 - 0.55 < 0.02 in floating point
        (0.5699, 0.55, 0.02, False),
        (0.54, 0.55, -0.01, True),
        (math.nan, 0.5, 0.0, False),
        (0.5, math.nan, 0.0, False),
        (math.inf, math.inf, 0.0, False),
    ],
)
def test_higher_is_better(new: float, old: float, min_gain: float, passed: bool) -> None:
    assert decide(gate(min_gain), {KEY: new}, {KEY: old}, "base").passed is passed


def test_lower_is_better() -> None:
    assert decide(gate(1.0), {KEY: 9.0}, {KEY: 10.0}, "base", higher_is_better=False).passed
    assert not decide(gate(1.0), {KEY: 10.0}, {KEY: 9.0}, "base", higher_is_better=False).passed


def test_the_reason_has_both_numbers() -> None:
    verdict = decide(gate(0.02), {KEY: 0.5}, {KEY: 0.49}, "models:/x/3")
    assert verdict.reasons == (f"{KEY} must gain at least 0.02: 0.5000 vs 0.4900: fail",)
    assert verdict.compared_with == "models:/x/3"


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"of the candidate, got 'gsm8k/exact_mtch,none'; did you mean 'gsm8k/exact_m"):
        decide(gate(metric="gsm8k/exact_mtch,none"), {KEY: 0.5}, {KEY: 0.5}, "base")
    with pytest.raises(InputError, match=r"a score of models:/x/3, got .*; there are no scores"):
        decide(gate(), {KEY: 0.5}, {}, "models:/x/3")
