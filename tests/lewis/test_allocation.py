"""Densities: worked by hand, and the promises of DESIGN section 4 for any importance."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewis.allocation import Allocation, allocate, norm_difference, uniform_like, weighted_mean
from lewis.errors import InputError
from lewis.importance import Layer
from lewis.recipe import Density

LAYERS = [Layer(f"{i}.{kind}.weight", i, kind, size) for kind, size in (("q", 10), ("up", 30)) for i in range(2)]
REST = ["embed.weight", "norm.weight"]
NAMES = [layer.tensor for layer in LAYERS] + REST


def run(differences: list[float] | None, **policy: Any) -> Allocation:
    given_ = None if differences is None else {layer.tensor: d for layer, d in zip(LAYERS, differences, strict=True)}
    return allocate(LAYERS, NAMES, Density(**policy), given_)


def covered(allocation: Allocation) -> list[float]:
    return [allocation.densities[layer.tensor] for layer in LAYERS]


def test_norm_difference_is_the_absolute_difference() -> None:
    assert norm_difference({"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 5.0}) == {"a": 2.0, "b": 4.0}
    with pytest.raises(InputError, match="'b' was measured in one of base and expert only"):
        norm_difference({"a": 3.0, "b": 1.0}, {"a": 1.0})


def test_shares_are_scaled_by_one_global_min_max() -> None:
    # q: 1/4 and 3/4; up: 1/2 and 1/2. Of [1/4, 3/4]: 0, 1, 1/2, 1/2.
    allocation = run([1, 3, 10, 10], min=0.2, max=0.6)
    assert covered(allocation) == pytest.approx([0.2, 0.6, 0.4, 0.4])
    assert allocation.mean == pytest.approx((0.2 * 10 + 0.6 * 10 + 0.4 * 60) / 80)
    assert allocation.differences == dict(zip(NAMES, [1, 3, 10, 10], strict=False))
    assert allocation.to_json() == {
        "densities": allocation.densities,
        "mean": allocation.mean,
        "differences": allocation.differences,
    }


def test_a_projection_that_did_not_move_has_no_share() -> None:
    assert covered(run([1, 3, 0, 0], min=0.2, max=0.6)) == pytest.approx([0.2 + 0.4 / 3, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("differences", [[0, 0, 0, 0], [2, 2, 5, 5]])
def test_all_equal_gives_the_midpoint(differences: list[float]) -> None:
    assert covered(run(differences, min=0.2, max=0.7)) == pytest.approx([0.45] * 4)


def test_equal_but_for_rounding_is_equal() -> None:
    layers = [Layer(f"{i}.{kind}", i, kind, 1) for kind in ("q", "up") for i in range(3)]
    moved = {layer.tensor: 0.1 if layer.projection == "q" else 0.7 for layer in layers}  # 0.1 / 0.3 is not 0.7 / 2.1
    densities = allocate(layers, list(moved), Density(min=0.2, max=0.7), moved).densities
    assert list(densities.values()) == pytest.approx([0.45] * 6)


@pytest.mark.parametrize("policy, level", [({}, 0.55), ({"budget": 0.1}, 0.1), ({"min": 0.5, "max": 0.5}, 0.5)])
def test_uniform_is_the_budget_or_the_midpoint(policy: dict[str, float], level: float) -> None:
    allocation = run(None, strategy="uniform", **policy)
    assert covered(allocation) == pytest.approx([level] * 4)
    assert allocation.differences == {} and allocation.mean == pytest.approx(level)


@pytest.mark.parametrize("uncovered, density", [("expert", 1.0), ("base", 0.0), ("mean", 0.4)])
def test_what_is_not_covered_follows_the_policy(uncovered: str, density: float) -> None:
    allocation = run([1, 3, 10, 10], min=0.2, max=0.6, uncovered=uncovered)
    assert [allocation.densities[name] for name in REST] == pytest.approx([density] * 2)
    assert list(allocation.densities) == NAMES


def test_the_uniform_baseline_has_the_same_mean_and_leaves_the_rest() -> None:
    guided = run([1, 9, 3, 10], min=0.2, max=0.6, uncovered="base")
    uniform = uniform_like(LAYERS, guided)
    assert covered(uniform) == [guided.mean] * 4 and uniform.mean == guided.mean
    assert [uniform.densities[name] for name in REST] == [0.0, 0.0]


bounds = st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted)
moved = st.lists(st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1.0, 1e-300, 1e30])), min_size=4, max_size=4)


@given(differences=moved, bounds=bounds)
def test_the_extremes_get_exactly_the_bounds(differences: list[float], bounds: list[float]) -> None:
    low, high = bounds
    densities = covered(run(differences, min=low, max=high))
    assert all(low <= density <= high for density in densities)
    if len(set(densities)) > 1:
        assert (min(densities), max(densities)) == (low, high)
    else:
        assert densities[0] == (low + high) / 2


@given(differences=moved, bounds=bounds, where=st.floats(0, 1))
def test_the_budget_is_met_exactly(differences: list[float], bounds: list[float], where: float) -> None:
    low, high = bounds
    budget = min(high, max(low, low + where * (high - low)))
    allocation = run(differences, min=low, max=high, budget=budget)
    densities = covered(allocation)
    assert all(low <= density <= high for density in densities)
    assert weighted_mean(LAYERS, allocation.densities) == allocation.mean == pytest.approx(budget, rel=1e-12, abs=1e-12)
    free = covered(run(differences, min=low, max=high))
    assert all(densities[i] <= densities[j] for i in range(4) for j in range(4) if free[i] < free[j]), (
        "a shift keeps the order"
    )


@given(differences=moved, scale=st.floats(0.01, 100))
def test_the_unit_of_importance_does_not_matter(differences: list[float], scale: float) -> None:
    plain, scaled = run([d * 1.0 for d in differences]), run([d * scale for d in differences])
    if max(differences) < 1e6 and min(d for d in [*differences, 1.0] if d) > 1e-6:
        assert covered(scaled) == pytest.approx(covered(plain), abs=1e-6)
