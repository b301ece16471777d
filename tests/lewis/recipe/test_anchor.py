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
