"""The block `serve`: what is read, what is refused, and that nobody else gets to see it."""

from pathlib import Path

import pytest

from lewis.errors import RecipeError
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


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("{kind: sagemaker}", "serve[0].kind: expected one of webhook, command, vllm, openai, haproxy, kserve"),
        ("[{url: x}]", "serve[0].kind: expected one of webhook, command, vllm, openai, haproxy, kserve"),
        ("[{kind: webhook, url: ftp://x}]", "serve[0].url: expected http://host/path or https://host"),
        ("[{kind: webhook, url: 'https://user:word@x/'}]", "serve[0].url: expected http://host/path or https://host"),
        ("[{kind: vllm, url: 'http://x'}]", "serve[0].kind: vLLM loads adapters; set output.kind to lora"),
        (
            "[{kind: kserve, namespace: m, services: [a, a], uri: 'pvc://x/{served_as}', prometheus: 'http://p'}]",
            "'a' twice",
        ),
        (
            "[{kind: kserve, namespace: m, services: [a, b], uri: 'pvc://x', prometheus: 'http://p'}]",
            "one with {served_as}",
        ),
        *(
            (
                f"[{{kind: kserve, namespace: m, services: a, uri: 's3://{{version}}/{name}', prometheus: 'http://p'}}]",
                f"serve[0].uri: expected a URI that a version always has, got {name}",
            )
            for name in ("{output}", "{previous}")  # what the services have would never count as the version
        ),
        (
            "[{kind: kserve, namespace: M, services: [a, b], uri: 'pvc://x/{path}', prometheus: 'http://p'}]",
            "namespace: s",
        ),
        (
            "[{kind: haproxy, prometheus: 'http://p', socket: /s, backend: b, servers: {one: 'http://x'}}]",
            "serve[0].servers: dictionary should have at least 2 items",
        ),
        *(
            (
                f"[{{kind: haproxy, prometheus: 'http://p', socket: /s, backend: b, servers: {servers}, {key}}}]",
                f"serve[0].{problem}",
            )
            for servers, key, problem in (
                ("{a: 'http://x', b: 'http://x/'}", "minutes: 5", "servers: expected two servers, between which"),
                ("{a: 'http://x', b: 'http://y'}", "steps: [50, 10]", "steps: expected percentages that grow from"),
                ("{a: 'http://x', b: 'http://y'}", "steps: [10, 10]", "steps: expected percentages that grow from"),
                (
                    "{a: 'http://x', b: 'http://y'}",
                    "rules: [{name: r, query: q}, {name: r, query: p}]",
                    "rules: 2 rules are called 'r'; give each a `name` of its own",
                ),
            )
        ),
        ("[{kind: webhook}]", "serve[0].url: missing; it is required"),
        ("[{kind: command, run: [x], urk: y}]", "serve[0].urk: unknown key; "),
        ("[{kind: command, run: [x], timeout_minute: 1}]", "did you mean 'timeout_minutes'?"),
        ("[{kind: command, run: rm -rf}]", "serve[0].run: input should be a valid list, got 'rm -rf'"),
        ("[{kind: command, run: [/bin/sh, -c, x]}]", "serve[0].run: expected the name of a program in LEWIS_SERVE"),
        ("[{kind: command, run: [..]}]", "without a path, got '..'"),
        ("[{kind: command, run: [x]}, {kind: command, run: [y]}]", "serve: 2 targets are called 'command'"),
        ("[{kind: command, run: [x], name: hub}]", "'hub' is the name of a target of LEWIS itself"),
    ],
)
def test_what_is_wrong_is_named(block: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(f"{RECIPE}serve: {block}", root=Path())
    assert problem in str(error.value)


def test_only_a_registered_model_can_be_served() -> None:
    with pytest.raises(RecipeError, match="serve: what is served is the champion of a registered model"):
        Recipe.parse(RECIPE.replace("register: {name: tiny}", "serve: {kind: command, run: [x]}"), root=Path())
