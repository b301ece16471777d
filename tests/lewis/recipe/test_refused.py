"""Every mistake of a recipe is reported at its place, with what was expected: `refused.txt` has a row for each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import RecipeError
from lewis.recipe import yaml_text
from lewis.recipe.recipe import Recipe
from tests.support.recipes import RECIPES


def rows() -> Iterator[tuple[str, str, str]]:
    """The name of a recipe, its change, and what is reported."""
    name = ""
    for line in Path(__file__).with_name("refused.txt").read_text().splitlines():
        if line.startswith("["):
            name = line[1:-1]
        elif line and not line.startswith("#"):
            change, expected = line.split(" => ")
            yield name, change, expected


@pytest.mark.parametrize("name, change, expected", rows())
def test_each_mistake_is_reported_at_its_place(name: str, change: str, expected: str) -> None:
    data: dict[str, Any] = yaml.safe_load(RECIPES[name])
    for path, value in yaml.safe_load(f"{{{change}}}").items():
        if value is None:
            del data[path]
        else:
            yaml_text.override(data, f"{path}={yaml.safe_dump(value, default_flow_style=True)}")
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(yaml.safe_dump(data), root=Path("/"))
    assert any(problem.startswith(expected) for problem in caught.value.problems), caught.value.problems
    if name == "fitted":
        assert len(caught.value.problems) == 1, caught.value.problems


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_changed_is_right_before(recipe: str) -> None:
    Recipe.parse(recipe, root=Path("/"))
