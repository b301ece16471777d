"""Example configs of mergekit's repository that do not run: each is told in one sentence why not, and what to do.

Those that run: `tests/lewis/whole/test_mergekit_examples.py`. "Of a branch": in its history or a fork, not in its last
version.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import RecipeError
from lewis.recipe.recipe import Recipe

MODELS = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
MOE = {"base_model": "a", "experts": [{"source_model": "a", "positive_prompts": ["x"]}, {"source_model": "b"}]}
EVOLVE = {"genome": {"models": ["a", "b"], "merge_method": "dare_ties"}, "tasks": [{"name": "t", "metric": "acc,none"}]}
PATTERN = {"t": [{"pattern": "self_attn", "value": [0, 1]}, {"value": 0.5}]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "docs/moe.md: gates": ({**MOE, "gate_mode": "hidden"}, "gate_mode: this is a config of mergekit-moe"),
    "docs/moe.md: shared": ({**MOE, "shared_experts": []}, "experts: this is a config of mergekit-moe"),
    "docs/evolve.md": (EVOLVE, "genome: this is a config of mergekit-evolve"),
    "examples/evo_bert_large.yml": (EVOLVE, "run lewis search"),
    "docs/create_a_merge_method.md": (
        {"merge_method": "simple_average", "models": MODELS, "parameters": {"normalize": True}},
        "merge_method: unknown method 'simple_average'",
    ),
    "docs/lrp_merge.md, examples/lrp.yml": (
        {"merge_method": "lrp", "base_model": "c", "models": MODELS},
        "merge_method: unknown method 'lrp'",
    ),
    "examples/cabs.yml": (
        {"merge_method": "cabs", "base_model": "c", "models": MODELS, "default_n_val": 8},
        "default_n_val: unknown key",
    ),
    "examples/chipalign.yml": (
        {"merge_method": "nuslerp", "models": MODELS, "parameters": {"geodesic": True}},
        "parameters.geodesic: nuslerp has no such parameter",
    ),
    "examples/core_space.yml": ({"merge_method": "core_space", "base_model": "a", "models": MODELS}, "'core_space'"),
    "examples/zipit.yml": (
        {"merge_method": "ties", "base_model": "c", "models": MODELS, "align_weights": "zipit"},
        "align_weights: unknown key",
    ),
    "examples/metrics-1.yml and its kin": (
        {"models": MODELS, "metric_method": "all"},
        "metric_method: this is a config that compares models",
    ),
    "docs/whisper-merging-guide.md, examples/whisper-merge-multilingual.yml": (
        {"merge_method": "slerp", "models": MODELS},
        "base_model: slerp starts from a base and needs one",
    ),
    "examples/whisper-lora-multilingual.yml": (
        {"merge_method": "slerp", "models": [{"model": "a", "lora": "b"}, {"model": "a", "lora": "c"}]},
        "models[0].lora: unknown key",
    ),
    "examples/whisper-encoder-decoder-weighted.yml": (
        {"merge_method": "encoder_decoder_weighted", "models": MODELS},
        "unknown method 'encoder_decoder_weighted'",
    ),
    "examples/ties.yml of a branch": ({"merge_method": "ranked_ties", "models": MODELS}, "did you mean"),
    "examples/gradient-slerp.yml of a branch": (
        {"merge_method": "slerp", "base_model": "a", "models": MODELS, "parameters": PATTERN},
        "expected {filter, value}, got the keys ['pattern', 'value']",
    ),
    "examples/mega.yml of a branch": (
        {"merge_method": "linear", "models": MODELS, "out_path": "x"},
        "out_path: this is a config of mergekit-mega; write `name`",
    ),
}


@pytest.mark.parametrize("example", REFUSED)
def test_an_example_that_does_not_run_is_told_why(example: str, tmp_path: Path) -> None:
    data, message = REFUSED[example]
    with pytest.raises(RecipeError) as error:
        Recipe.parse(yaml.safe_dump(data), root=tmp_path)
    assert message in str(error.value)
