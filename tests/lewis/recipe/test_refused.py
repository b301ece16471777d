"""Every mistake of a recipe is told at its place, with what was expected: `refused.txt` has a row for each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import RecipeError
from lewis.recipe import yaml_text
from lewis.recipe.recipe import Recipe

_PLAIN = (
    "merge_method: ties\nbase_model: org/base@abc\nmodels: [{model: org/base@abc}, {model: org/math}, {model: c}]\n"
)
_SOURCES = "sources: [{model: org/base, layer_range: [0, 2]}, {model: org/a, layer_range: [0, 2]}]"
_SCORED = "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nevaluate: {tasks: [x]}\nregister: {name: tiny}\n"
_CANARY = (
    "serve: {kind: haproxy, prometheus: 'http://p', socket: /s, backend: b, servers: {a: 'http://x', b: 'http://y'}}"
)
_CLUSTER = "serve: {kind: kserve, namespace: m, services: [a, b], uri: 'pvc://x/{path}', prometheus: 'http://p'}"
RECIPES = {
    "plain": _PLAIN,
    "sliced": f"merge_method: ties\nbase_model: org/base\nslices: [{{{_SOURCES}}}, {{{_SOURCES}}}]",
    "guided": f"{_PLAIN}lewis: {{calibrations: {{s: {{texts: [one, two]}}}}}}",
    "method": "merge_method: ties\nbase_model: b\nmodels: [{model: a}, {model: c}]",
    "fitted": "merge_method: regmean_forward\nbase_model: b\nmodels: [{model: a}, {model: c}]\n"
    "lewis: {calibrations: {s: {texts: [x]}}}\nanchor: {merge_method: ties, weight: [0.0, 1.0]}",
    "scored": f"{_SCORED.replace('tiny}', 'tiny, gate: {metric: m}}')}",
    "cluster": _SCORED + _CLUSTER,
    "canary": _SCORED + "output: {kind: lora, rank: 4}\n" + _CANARY,
}


def rows() -> Iterator[tuple[str, str, str]]:
    """The name of a recipe, its change, and what is told of it."""
    name = ""
    for line in Path(__file__).with_name("refused.txt").read_text().splitlines():
        if line.startswith("["):
            name = line[1:-1]
        elif line and not line.startswith("#"):
            change, told = line.split(" => ")
            yield name, change, told


@pytest.mark.parametrize("name, change, told", rows())
def test_each_mistake_is_told_at_its_place(name: str, change: str, told: str) -> None:
    data: dict[str, Any] = yaml.safe_load(RECIPES[name])
    for path, value in yaml.safe_load(f"{{{change}}}").items():
        if value is None:
            del data[path]
        else:
            yaml_text.override(data, f"{path}={yaml.safe_dump(value, default_flow_style=True)}")
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(yaml.safe_dump(data), root=Path("/"))
    assert any(problem.startswith(told) for problem in caught.value.problems), caught.value.problems
    if name == "fitted":
        assert len(caught.value.problems) == 1, caught.value.problems


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_changed_is_right_before(recipe: str) -> None:
    Recipe.parse(recipe, root=Path("/"))
