"""Any text is a recipe, or is refused in the product's own words."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from lewis.errors import LewisError
from lewis.recipe.recipe import Recipe
from tests.faults.fuzz import ANY, ODD, changed, fuzzed, outcome
from tests.support.recipes import RECIPES, examples

DATA = [*examples(), *map(yaml.safe_load, RECIPES.values())]
MARKS = st.one_of(
    st.sampled_from(
        ["[", "{", "]", "}", "- ", "? ", ": ", "&a ", "*a", "<<: ", "#", "|\n", ">", "'", '"', "\n", "  ", "\t"]
    ),
    st.sampled_from(
        ["!!int ", "!!set ", "!!binary ", "!x ", "2024-99-99", "1:60:60", "0x", "~", "=", "[[[[[[[[", '"\\ud800"']
    ),
    st.sampled_from(["%YAML 1.1\n", "---\n", "...\n", "\0", "\ufeff", "\x85", "- model: a\n", "models:\n", "seed: "]),
)
KEYS = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.none(), st.dates())
VALUES = ANY | st.dictionaries(KEYS, ODD, max_size=3) | st.sets(st.integers(), max_size=3)


@fuzzed
@given(text=st.lists(MARKS | st.text(max_size=5), max_size=30).map("".join) | st.binary(max_size=80))
def test_any_text(text: str | bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    outcome(lambda: Recipe.load(path))


@fuzzed
@given(data=st.sampled_from(DATA).flatmap(lambda recipe: changed(recipe, VALUES)))
def test_a_recipe_with_odd_values(data: Any) -> None:
    text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
    found = outcome(lambda: Recipe.parse(text, root=Path("/nowhere")))
    if not isinstance(found, LewisError):
        outcome(lambda: (found.experts, found.vocabulary, found.blocks, found.model_dump_json(), found.text.encode()))


@fuzzed
@given(
    path=st.sampled_from(["seed", "models[0].model", "lewis.density.min", "x.y[3]"]) | st.text(max_size=9), value=ANY
)
def test_a_setting(path: str, value: Any) -> None:
    text = RECIPES["guided"]
    setting = f"{path}={yaml.safe_dump(value, default_flow_style=True)}"
    outcome(lambda: Recipe.parse(text, root=Path("/nowhere"), overrides=[setting]))
