"""mergekit's settings: scalars, gradients, filters, and which of them holds for a tensor."""

from typing import Any

import pytest

from lewis.recipe.parameter_values import Rule, parse_setting, value_at

NAME = "model.layers.3.self_attn.q_proj.weight"


def at(raw: Any, tensor: str = NAME, position: float = 0.0, parse: Any = float) -> Any:
    return value_at(parse_setting(raw), tensor, position, parse)


def test_a_scalar_holds_everywhere() -> None:
    assert at(0.5) == 0.5
    assert at("1e-3") == 0.001


@pytest.mark.parametrize("position, expected", [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.75), (1.0, 0.5)])
def test_a_gradient_is_interpolated(position: float, expected: float) -> None:
    assert at([0, 1, 0.5], position=position) == pytest.approx(expected)


def test_a_gradient_of_one_value_is_that_value() -> None:
    assert at([0.7], position=0.4) == 0.7


def test_a_gradient_of_switches_is_picked() -> None:
    assert [at([True, False], position=p, parse=bool) for p in (0.0, 0.9, 1.0)] == [True, True, False]


def test_the_first_filter_that_matches_holds() -> None:
    raw = [{"filter": "q_proj", "value": 0.1}, {"filter": "self_attn", "value": 0.2}, {"value": 0.3}]
    assert at(raw) == 0.1
    assert at(raw, "model.layers.3.self_attn.k_proj.weight") == 0.2
    assert at(raw, "lm_head.weight") == 0.3


def test_a_star_matches_all() -> None:
    assert at([{"filter": "*", "value": 0.4}]) == 0.4


def test_no_match_is_none() -> None:
    assert at([{"filter": "mlp", "value": 0.4}]) is None


def test_a_filter_may_hold_a_gradient() -> None:
    assert at({"filter": "q_proj", "value": [0, 1]}, position=0.25) == 0.25


def test_parsed_rules_pass_through() -> None:
    rules = (Rule(1.0, "a"),)
    assert parse_setting(rules) is rules


@pytest.mark.parametrize(
    "raw, expected",
    [
        (None, "expected a number, a list"),
        ([], "expected a number, a list"),
        ([1, {"value": 2}], "expected a number, a list"),
        ([{"filter": "a"}], r"expected \{filter, value\}, got the keys \['filter'\]"),
        ([{"filtre": "a", "value": 1}], "got the keys"),
        ([{"filter": "", "value": 1}], "a part of a tensor's name"),
        ([{"filter": 5, "value": 1}], "a part of a tensor's name, got 5"),
        ([{"value": [{"filter": "a", "value": 1}]}], "a number or a gradient as the value"),
    ],
)
def test_anything_else_is_refused(raw: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_setting(raw)
