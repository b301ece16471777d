"""Recipes for tests that change them: small ones, each of another kind, and those that are shipped as examples."""

from pathlib import Path
from typing import Any

import yaml

_PLAIN = (
    "merge_method: ties\nbase_model: org/base@abc\nmodels: [{model: org/base@abc}, {model: org/math}, {model: c}]\n"
)
_SOURCES = "sources: [{model: org/base, layer_range: [0, 2]}, {model: org/a, layer_range: [0, 2]}]"
_SCORED = "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nevaluate: {tasks: [x]}\nregister: {name: tiny}\n"
_CANARY = (
    "serve: {kind: haproxy, prometheus: 'http://p', socket: /s, backend: b, servers: {a: 'http://x', b: 'http://y'}}"
)
_CLUSTER = "serve: {kind: kserve, namespace: m, services: [a, b], uri: 'pvc://x/{path}', prometheus: 'http://p'}"
RECIPES: dict[str, str] = {
    "plain": _PLAIN,
    "sliced": f"merge_method: ties\nbase_model: org/base\nslices: [{{{_SOURCES}}}, {{{_SOURCES}}}]",
    "guided": f"{_PLAIN}lewis: {{calibrations: {{s: {{texts: [one, two]}}}}}}",
    "mergekit": "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}",
    "method": "merge_method: ties\nbase_model: b\nmodels: [{model: a}, {model: c}]",
    "fitted": "merge_method: regmean_forward\nbase_model: b\nmodels: [{model: a}, {model: c}]\n"
    "lewis: {calibrations: {s: {texts: [x]}}}\nanchor: {merge_method: ties, weight: [0.0, 1.0]}",
    "scored": f"{_SCORED.replace('tiny}', 'tiny, gate: {metric: m}}')}",
    "cluster": _SCORED + _CLUSTER,
    "canary": _SCORED + "output: {kind: lora, rank: 4}\n" + _CANARY,
}
"""Name -> the text of a recipe that is right."""


def examples() -> list[dict[str, Any]]:
    """The data of all recipes in `deployments/examples`."""
    folder = Path(__file__).parents[2] / "deployments" / "examples"
    return [yaml.safe_load(file.read_text()) for file in sorted(folder.glob("*.yaml"))]
