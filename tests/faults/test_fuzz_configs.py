"""A config that no network can have is refused before any work, of every architecture; transformers' own are not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import lewis
from lewis.errors import InputError
from lewis.models.config import check_config
from tests.conftest import Family
from tests.faults.fuzz import DRAWS
from tests.support.models import edit_json, parse, rewrite
from tests.support.tiny_architectures import architectures, tiny

FEW = ["llama", "gpt2", "t5", "lfm2", "mixtral", "gemma3", "qwen3_vl_moe", "recurrent_gemma", "zamba2", "mamba2"]
KEYS = [
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "vocab_size",
]
OPTIONAL = ["num_key_value_heads", "intermediate_size", "head_dim"]
WRONG = ["16", float("nan"), 1e9, 16.5, -1, True, []]
CASES = [
    *((key, value) for key in (*KEYS, "vocab_size") for value in (*WRONG, 0, None)),
    *((k, v) for k in OPTIONAL for v in WRONG),
]


@pytest.mark.parametrize("kind", architectures() if DRAWS > 1000 else FEW)
def test_of_every_architecture(kind: str) -> None:
    try:
        model = tiny(kind)
    except Exception as error:
        pytest.skip(f"transformers has no tiny one: {error}")
    config = json.loads(model.config.to_json_string(use_diff=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_config(Path("model"), config, shapes)
    for path in ((), ("text_config",)):
        for key, value in CASES:
            changed = copy.deepcopy(config)
            block = changed.get(path[0]) if path else changed
            if isinstance(block, dict) and key in block:
                block[key] = value
                with pytest.raises(InputError, match=rf"config.json: {'.'.join((*path, key))}: expected .*, got "):
                    check_config(Path("model"), changed, shapes)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "16"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"vocab_size": 1e9},
        {"hidden_size": 17},
    ],
)
@pytest.mark.parametrize("which", ["base", "expert"])
def test_before_any_work(family: Family, home: Path, tmp_path: Path, change: dict[str, Any], which: str) -> None:
    odd = rewrite({"base": family.base, "expert": family.math}[which], tmp_path / "odd", lambda name, tensor: tensor)
    edit_json(odd / "config.json", **change)
    base, expert = (odd, family.math) if which == "base" else (family.base, odd)
    models = [{"model": str(expert)}, {"model": str(family.code)}]
    recipe = parse({"merge_method": "ties", "base_model": str(base), "models": models})
    [key] = change
    for refused in (lambda: lewis.plan(recipe), lambda: lewis.merge(recipe, tmp_path / "merged")):
        with pytest.raises(InputError, match=f"odd: config.json: {key}: expected "):
            refused()
    assert not (tmp_path / "merged").exists()
    if which == "base":
        with pytest.raises(InputError, match=f"odd: config.json: {key}: expected "):
            lewis.inspect(recipe)
    else:
        assert any(
            each.kind == "no fit" and f"config.json: {key}" in each.what for each in lewis.inspect(recipe).errors
        )
