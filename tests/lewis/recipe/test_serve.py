"""The block `serve`: what is read, and that nobody else gets to see it."""

from pathlib import Path

from lewis.recipe.recipe import Recipe
from lewis.registry.registration import flat_parameters, model_card
from lewis.store import digest

RECIPE = """# The nightly merge.
merge_method: ties
base_model: org/base
models: [{model: org/math}]
register: {name: tiny}
"""
SERVE = """serve:
  - {kind: webhook, url: "https://internal.example/hook"}

  # the last
  - kind: command
    name: script
    run: [deploy, --now]
evaluate: {tasks: [x]}  # scores
"""


def test_targets_are_read_in_their_order_and_one_needs_no_list() -> None:
    recipe = Recipe.parse(RECIPE + SERVE, root=Path())
    assert [(each.label, each.kind) for each in recipe.serve] == [("webhook", "webhook"), ("script", "command")]
    one = Recipe.parse(RECIPE + "serve: {kind: command, run: [x]}", root=Path())
    assert [each.label for each in one.serve] == ["command"] and Recipe.parse(RECIPE, root=Path()).serve == ()
    assert recipe.blocks == Recipe.parse(RECIPE, root=Path()).blocks, "it does not decide the merged weights"


def test_no_card_and_no_file_of_the_model_names_the_targets() -> None:
    recipe = Recipe.parse(RECIPE + SERVE, root=Path())
    assert recipe.public_text == RECIPE + "evaluate: {tasks: [x]}  # scores\n"
    last = Recipe.parse(f"{RECIPE}serve:\n- kind: command\n  run: [x]", root=Path())
    assert last.public_text == RECIPE
    flow = Recipe.parse(f"{{{', '.join(RECIPE.splitlines()[1:])}, serve: {{kind: command, run: [x]}}}}", root=Path())
    assert "serve" not in flow.public_text and "tiny" in flow.public_text
    assert "internal.example" not in model_card(recipe, None, [], {}, {}) and digest(recipe.text)
    assert not any(key.startswith("serve") for key in flat_parameters(recipe))
