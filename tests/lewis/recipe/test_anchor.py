"""The block `anchor` of a recipe: what it takes, and what is refused before any work."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import RecipeError
from lewis.methods import METHODS
from lewis.recipe.recipe import Recipe
from lewis.search import space

RECIPE: dict[str, Any] = {
    "merge_method": "regmean_forward",
    "base_model": "b",
    "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "c"}],
    "lewis": {"calibrations": {"s": {"texts": ["x"], "samples": 1}}},
    "anchor": {"merge_method": "ties", "parameters": {"lambda": [1.0, 2.0]}, "weight": [0.0, 1.0]},
}


def parse(**changes: Any) -> Recipe:
    return Recipe.parse(yaml.safe_dump(RECIPE | changes), root=Path("/"))


def lewis(**keys: Any) -> dict[str, Any]:
    return {**RECIPE["lewis"], **keys}


def test_values_are_the_anchors_then_for_weight_the_recipes_then_the_default() -> None:
    recipe, of_ties = parse(parameters={"weight": 3}), METHODS["ties"].parameters

    def found(name: str, expert: int) -> Any:
        return recipe.anchor_value(of_ties[name], recipe.experts[expert], "x", 0.5)

    assert [found("lambda", 0), found("normalize", 0), found("density", 1)] == [1.5, True, 1.0]
    assert [found("weight", i) for i in range(2)] == [0.5, 3]
    assert recipe.anchor_weight("x", 0.25) == 0.25


def test_the_lewis_block_guides_an_anchor_if_it_says_how() -> None:
    plain, guided = parse(), parse(lewis=lewis(density={"budget": 0.5}))
    assert plain.allocator is None and not plain.measures
    assert guided.allocator is guided.lewis and guided.guided and guided.measures and guided.guided_method == "ties"


def test_without_an_anchor_the_cache_key_is_as_it_was() -> None:
    assert "anchor" not in parse(anchor=None).blocks and "anchor" in parse().blocks


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"merge_method": "ties", "lewis": None},
            "anchor: ties fits nothing that it could pull; remove it, or use one",
        ),
        ({"anchor": {"weight": 1}}, "anchor.merge_method: missing"),
        ({"anchor": {"merge_method": "tie"}}, "anchor.merge_method: unknown method 'tie'; did you mean 'ties'?"),
        ({"anchor": {"merge_method": "regmean"}}, "anchor.merge_method: expected a method that does not fit itself"),
        ({"anchor": {"merge_method": "ties", "wait": 1}}, "anchor.wait: unknown key; did you mean 'weight'?"),
        ({"anchor": {"merge_method": "ties", "weight": -1}}, "anchor.weight: expected a number >= 0, got -1"),
        ({"anchor": {"merge_method": "linear", "weight": 0.5}}, "anchor.weight: linear merges weights, not task"),
        (
            {"anchor": {"merge_method": "ties", "parameters": {"densety": 1}}},
            "anchor.parameters.densety: ties has no such parameter; did you mean 'density'?",
        ),
        (
            {"anchor": {"merge_method": "ties", "parameters": {"density": 2}}},
            "anchor.parameters.density: expected 0 < density <= 1",
        ),
        (
            {"anchor": {"merge_method": "slerp"}, "models": [{"model": "a"}]},
            "anchor.parameters.t: missing; slerp needs it",
        ),
        (
            {"anchor": {"merge_method": "slerp", "parameters": {"t": 0.5}}},
            "anchor.merge_method: slerp merges exactly 1 model, not counting the base; got 2",
        ),
        (
            {"anchor": {"merge_method": "della", "parameters": {"density": 0.1}}},
            "anchor.parameters: expected 0 < density - epsilon",
        ),
        ({"parameters": {"lambda": 0.5}}, "parameters.lambda: it scales the sum that the anchor takes the place of"),
        (
            {"parameters": {"ridge": [0.1, "auto"]}},
            "parameters.ridge: auto is found for the whole merge; write",
        ),
        ({"parameters": {"ridge": "aut"}}, "parameters.ridge: expected a finite number or auto, got 'aut'"),
        ({"parameters": {"alpha": 1.5}}, "parameters.alpha: expected a number >= 0 and <= 1, got 1.5"),
        ({"lewis": None}, "lewis.calibrations: missing; regmean_forward fits"),
        (
            {"lewis": {"density": {"strategy": "uniform"}}},
            "lewis.calibrations: missing; regmean_forward fits the projections to the experts on calibration rows",
        ),
        (
            {"merge_method": "regmean", "lewis": {}},
            "lewis.calibrations: missing; regmean fits the projections to the experts on calibration rows; add",
        ),
        (
            {"anchor": {"merge_method": "linear"}, "lewis": lewis(density={"budget": 0.5})},
            "lewis: linear takes no density to guide; use one of ties",
        ),
        (
            {"anchor": {"merge_method": "dare_ties"}, "lewis": lewis(prune_by="activation")},
            "lewis.prune_by: dare_ties does not trim by size",
        ),
        (
            {"anchor": None, "lewis": lewis(density={"budget": 0.5})},
            "lewis.density: regmean_forward keeps whole task vectors and has no use for it; remove it, or let it guide",
        ),
    ],
)
def test_bad_ones_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(**changes)
    found = list(caught.value.problems)
    assert len(found) == 1 and found[0].startswith(expected), found


def test_a_filter_that_matches_nothing_is_refused() -> None:
    recipe = parse(anchor={"merge_method": "ties", "weight": [{"filter": "mlq", "value": 2}, {"value": 1}]})
    with pytest.raises(RecipeError, match=r"anchor\.weight\[0\]\.filter: 'mlq' matches no tensor"):
        recipe.check_filters(["model.layers.0.mlp.up_proj.weight"], {})


def test_a_search_varies_alpha_ridge_the_anchors_weight_and_lambda_by_depth() -> None:
    wanted = {
        "parameters.alpha": {"min": 0.5, "max": 1.0},
        "parameters.ridge": {"min": 0.001, "max": 1.0, "log": True},
        "anchor.weight[1]": {"min": 0.5, "max": 1.5},
        "anchor.parameters.lambda[0]": {"min": 0.5, "max": 1.5},
        "anchor.parameters.density": {"min": 0.2, "max": 1.0},
    }
    recipe = parse(search={"space": wanted, "metrics": ["x/y,none"]}, evaluate={"tasks": ["x"]})
    space.check(recipe)
    own = [space.value_of(recipe, path) for path in wanted]
    assert own == [1.0, 0.01, 1.0, 1.0, 1.0]
    assert space.value_of(parse(anchor={"merge_method": "ties"}), "anchor.weight") == 1.0
    tried = space.with_values(recipe, {"anchor.weight[1]": 0.7, "parameters.alpha": 0.9})
    assert tried.anchor_weight("x", 1.0) == 0.7 and tried.blocks != recipe.blocks
    bad = parse(search={"space": {"anchor.weight": {"min": -1, "max": 1}}, "metrics": ["x/y,none"]})
    with pytest.raises(RecipeError, match=r"search\.space\.anchor\.weight: anchor\.weight: expected a number >= 0"):
        space.check(bad)
