"""Any text is a recipe, or is refused in the product's own words."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from lewis.errors import LewisError
from lewis.recipe.recipe import Recipe
from tests.faults.fuzz import ANY, ODD, changed, fuzzed, outcome

RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [
        {"model": "org/math", "parameters": {"weight": 1.0, "density": [0.2, 0.8]}, "calibration": "sums"},
        {"model": {"model": {"path": "org/code", "revision": "main"}}, "calibration": "code"},
    ],
    "parameters": {"lambda": 1.0, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]},
    "dtype": "bfloat16",
    "tokenizer": {"source": "union", "tokens": {"<x>": {"source": {"kind": "zero"}}}},
    "exclude": ["embed"],
    "seed": 3,
    "lewis": {
        "calibrations": {
            "sums": {"dataset": "json", "data_files": ["a.jsonl"], "text": "{a} {b}", "samples": 4},
            "code": {"texts": ["a", "b"], "max_tokens": 9},
        },
        "importance": {"metric": "norm_difference", "prune_ratio": 0.5},
        "density": {"strategy": "lewis", "min": 0.3, "max": 0.8, "budget": 0.5},
        "prune_by": "magnitude",
        "aim": {"omega": 0.5},
    },
    "output": {"kind": "full"},
    "evaluate": {"tasks": ["words.yaml", "gsm8k"], "weights": {"words": 1.0}, "baselines": ["base"], "limit": 5},
    "register": {"name": "x", "gate": {"metric": "words/acc,none", "tolerance": {"words": 0.1}}},
    "publish": {"repo": "org/x"},
    "search": {"space": {"parameters.lambda": {"min": 0.1, "max": 1.0}, "merge_method": ["ties"]}, "trials": 2},
}
FITTED: dict[str, Any] = {
    "merge_method": "regmean_forward",
    "base_model": "org/base",
    "models": [{"model": "org/math", "calibration": "sums"}, {"model": "org/code", "calibration": "chats"}],
    "anchor": {"merge_method": "ties", "parameters": {"density": 0.3}, "weight": [{"filter": "mlp", "value": 0.5}]},
    "chat_template": "chatml",
    "lewis": {
        "calibrations": {
            "sums": {"texts": ["a", "b"], "continue": 2, "seed": 3},
            "chats": {"dataset": "org/rows", "messages": "chat", "weight": {"prompt": 0.5}},
        },
        "hold_back": False,
    },
    "output": {"kind": "lora", "rank": 4, "tolerance": 0.1},
    "inspect": {"on": "warn"},
    "evaluate": {
        **{"tasks": ["words"], "backend": "vllm", "model_args": {"dtype": "auto", "chat_template_args": {"x": 1}}},
        **{"stop": "known", "documents": "by_release", "limit": 5, "gpus": 2},
    },
    "register": {"name": "x", "gate": {"metric": "words/acc,none", "min_gain": 0.1, "judge": {"model": "j"}}},
    "serve": [
        {"kind": "webhook", "url": "http://x/hook"},
        {"kind": "command", "run": ["restart", "x"]},
        {"kind": "vllm", "url": "http://x", "check": {"documents": 3}},
        {"kind": "openai", "url": "http://x/load", "body": {"path": "{path}"}, "expect": {"ok": True}},
        {
            **{"kind": "haproxy", "prometheus": "http://p", "socket": "/s", "backend": "b"},
            **{"servers": {"one": "http://a", "two": "http://b"}, "steps": [10, 50]},
        },
        {
            **{"kind": "kserve", "prometheus": "http://p", "namespace": "m", "services": ["a", "b"]},
            **{"uri": "pvc://x/{served_as}", "rules": [{"name": "r", "query": "q", "times": 2}]},
        },
    ],
}
SLICED: dict[str, Any] = {
    "name": "stack",
    "random_seed": 3,
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "org/a", "layer_range": [0, 2], "parameters": {"scale": 0.5}}]},
        {"sources": [{"model": "org/b", "layer_range": [1, 3]}], "parameters": {"scale": [0.1, 0.2]}},
    ],
    "tokenizer_source": "org/a",
}
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
@given(data=st.sampled_from([RECIPE, FITTED, SLICED]).flatmap(lambda recipe: changed(recipe, VALUES)))
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
    text = yaml.safe_dump(RECIPE)
    setting = f"{path}={yaml.safe_dump(value, default_flow_style=True)}"
    outcome(lambda: Recipe.parse(text, root=Path("/nowhere"), overrides=[setting]))
