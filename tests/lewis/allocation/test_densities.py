"""Densities: worked by hand, and what every strategy promises for any importance."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis.allocation.densities import Allocation, allocate, distance_to_uniform, uniform_like, weighted_mean
from lewis.allocation.evidence import norm_difference
from lewis.errors import InputError
from lewis.models.network.module_tree import Layer
from lewis.recipe.schema import Density

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


def test_a_share_under_one_threshold_keeps_the_elements_that_it_counted() -> None:
    layers = [Layer("0.q.weight", 0, "q", 49), Layer("0.k.weight", 0, "k", 93)]
    counts = {"0.q.weight": 1, "0.k.weight": 29}
    shares = {layer.tensor: counts[layer.tensor] / layer.parameters for layer in layers}
    policy = Density(strategy="global", min=0.01, max=1.0, budget=30 / 142)
    found = allocate(layers, list(shares), policy, shares).densities
    assert int(shares["0.q.weight"] * 49) == 0  # 1 / 49 * 49 is less than 1
    assert {name: int(found[name] * layer.parameters) for name, layer in zip(found, layers, strict=True)} == counts


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


BLOCKS = [Layer(f"m.{i}.{kind}.weight", i, kind, size) for kind, size in (("q", 10), ("up", 30)) for i in range(3)]


def of_blocks(values: list[float | None] | None, **policy: Any) -> dict[str, float]:
    evidence = None if values is None else {x.key: v for x, v in zip(BLOCKS, values, strict=True)}
    return allocate(BLOCKS, [x.tensor for x in BLOCKS], Density(**policy), evidence).densities


class TestScales:
    VALUES = (1.0, 2.0, 7.0, 4.0, 3.0, 3.0)  # shares: 0.1 0.2 0.7, 0.4 0.3 0.3

    def test_rank(self) -> None:
        # In order: 0.1, 0.2, 0.3, 0.3, 0.4, 0.7; the two of 0.3 share ranks 2 and 3.
        found = of_blocks([*self.VALUES], scale="rank", min=0.1, max=0.6)
        assert list(found.values()) == pytest.approx([0.1, 0.2, 0.6, 0.5, 0.35, 0.35])

    def test_rank_of_equals_is_the_midpoint(self) -> None:
        assert set(of_blocks([1, 1, 1, 2, 2, 2], scale="rank", min=0.1, max=0.6).values()) == {0.35}

    def test_robust_moves_outliers_to_the_percentiles(self) -> None:
        layers = [Layer(f"m.{i}.q.weight", i, "q", 10) for i in range(41)]
        moved = {x.key: 1000.0 if i == 40 else float(i) for i, x in enumerate(layers)}
        plain, robust = (
            allocate(layers, [x.tensor for x in layers], Density(scale=s), moved).densities
            for s in ("minmax", "robust")
        )
        assert sorted(plain.values())[-2] < 0.33  # one outlier takes the maximum, the others stay at the minimum
        assert sorted(robust.values())[20] == pytest.approx(0.55, abs=0.01)
        assert (min(robust.values()), max(robust.values())) == (0.3, 0.8)

    def test_decimals_make_small_shares_equal(self) -> None:
        values = [1.0, 1.000001, 2.0]
        layers = [Layer(f"m.{i}.q.weight", i, "q", 10) for i in range(3)]
        moved = {x.key: v for x, v in zip(layers, values, strict=True)}
        found = allocate(layers, [x.tensor for x in layers], Density(decimals=5), moved).densities
        assert list(found.values()) == [0.3, 0.3, 0.8]


class TestOtherAllocators:
    def test_owl_goes_by_blocks_around_the_target(self) -> None:
        # Blocks: (10 a + 30 b) / 40 = 0.1, 0.2, 0.3. lambda = 0.05: r = 0, 0.05, 0.1.
        found = of_blocks([0.1, 0.2, 0.3, 0.1, 0.2, 0.3], strategy="owl", min=0.05, max=0.3, budget=0.1)
        assert list(found.values()) == pytest.approx([0.05, 0.1, 0.15] * 2)

    def test_dlp_gives_the_most_to_the_smallest_median(self) -> None:
        found = list(of_blocks([3, 2, 1, 3, 2, 1], strategy="dlp", min=0.3, max=0.8).values())
        assert found == pytest.approx([0.3, 0.55, 0.8] * 2)

    def test_depth_gradient_falls_with_the_depth(self) -> None:
        assert list(of_blocks(None, strategy="depth_gradient", min=0.2, max=0.6).values()) == [0.6, 0.4, 0.2] * 2

    @pytest.mark.parametrize("strategy", ["lewis", "owl", "dlp", "depth_gradient"])
    @pytest.mark.parametrize("budget", [0.03, 0.1, 0.3, 0.5])
    @settings(max_examples=25)
    @given(values=st.lists(st.floats(0, 1e3), min_size=6, max_size=6))
    def test_each_meets_the_budget_within_the_bounds(self, strategy: str, budget: float, values: list[float]) -> None:
        evidence = None if strategy == "depth_gradient" else {x.key: v for x, v in zip(BLOCKS, values, strict=True)}
        policy = Density(strategy=strategy, min=0.01, max=0.9, budget=budget)  # type: ignore[arg-type]
        found = allocate(BLOCKS, [x.tensor for x in BLOCKS], policy, evidence)
        assert found.mean == pytest.approx(budget, abs=1e-9)
        assert all(0.01 <= rho <= 0.9 for rho in found.densities.values())


def test_layers_that_no_token_reached_follow_the_policy_for_what_is_not_covered() -> None:
    evidence: dict[str, float | None] = {x.key: float(i + 1) for i, x in enumerate(BLOCKS)} | {BLOCKS[0].key: None}
    policy = Density(uncovered="base", budget=0.4)
    found = allocate(BLOCKS, [x.tensor for x in BLOCKS], policy, evidence)
    assert found.densities[BLOCKS[0].tensor] == 0 and BLOCKS[0].key not in found.differences
    assert weighted_mean(BLOCKS[1:], found.densities) == pytest.approx(0.4) == found.mean
    uniform = uniform_like(BLOCKS, found)
    assert uniform.densities[BLOCKS[0].tensor] == 0 and set(list(uniform.densities.values())[1:]) == {found.mean}


def test_a_fused_tensor_has_the_mean_of_its_parts() -> None:
    layers = [Layer(f"m.{i}.qkv.weight", i, f"qkv.{p}", n, p) for i in range(2) for p, n in (("q", 30), ("k", 10))]
    moved = dict(zip((x.key for x in layers), [1.0, 3.0, 3.0, 1.0], strict=True))
    found = allocate(layers, ["m.0.qkv.weight", "m.1.qkv.weight"], Density(min=0.2, max=0.6), moved)
    assert list(found.densities.values()) == pytest.approx([(0.2 * 30 + 0.6 * 10) / 40, (0.6 * 30 + 0.2 * 10) / 40])


def test_the_distance_to_uniform_is_the_part_that_lies_elsewhere() -> None:
    found = run([1, 3, 10, 10], min=0.2, max=0.6)  # 10 x 0.2, 10 x 0.6, 60 x 0.4; mean 0.4
    assert distance_to_uniform(LAYERS, found) == pytest.approx((10 * 0.2 + 10 * 0.2) / (2 * 32))
    assert distance_to_uniform(LAYERS, uniform_like(LAYERS, found)) == 0
