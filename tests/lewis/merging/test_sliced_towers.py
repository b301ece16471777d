"""Slices of models with several stacks of layers: they are the language model's, or refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lewis.errors import InputError
from lewis.merging.sliced import Stack
from lewis.models.layers.stack import layers_of
from lewis.models.layers.stack_config import Origin, restacked
from lewis.models.network.network_class import text_tower
from tests.lewis.merging.test_sliced import merged, opened, sliced, source
from tests.support import pipeline
from tests.support.architecture_check import moved
from tests.support.models import parse, write_tokenizer
from tests.support.tiny_architectures import tiny

TOKENS = torch.arange(3, 13)[None]


def two(kind: str, folder: Path) -> tuple[Path, Path]:
    """A tiny random model, and a fine-tune of it."""
    tiny(kind).save_pretrained(folder / "one")
    return folder / "one", moved(folder / "one", folder / "two", 1)


def loaded(kind: str, folder: Path) -> Any:
    return type(tiny(kind)).from_pretrained(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["llava", "qwen3_vl", *(pytest.param(k, marks=pytest.mark.long) for k in ("qwen2_vl", "gemma3", "mllama"))]
)
def test_the_language_model_is_stacked_and_the_towers_come_from_the_first_slice(kind: str, tmp_path: Path) -> None:
    one, other = two(kind, tmp_path)
    found = merged(sliced("passthrough", [source(one, 0, 2)], [source(other, 1, 2)]), tmp_path / "out")
    ours, theirs = (load_file(model / "model.safetensors") for model in (one, other))
    layers = layers_of("one", ours)
    expected = ours | {name: theirs[name] for name in layers.after}
    for suffix in layers.tensors[1]:
        expected[layers.name(2, suffix)] = theirs[layers.name(1, suffix)]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert any("visi" in name or "visual" in name for name in layers.before)
    result, by_hand, fine_tune = (loaded(kind, path) for path in (tmp_path / "out", one, other))
    tower, last = text_tower(by_hand), text_tower(fine_tune)
    tower.layers.append(copy.deepcopy(last.layers[1]))
    tower.norm = last.norm
    for i, layer in enumerate(tower.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    text = by_hand.config.get_text_config()
    text.num_hidden_layers = 3
    if getattr(text, "layer_types", None):
        text.layer_types = [*text.layer_types, text.layer_types[1]]
    with torch.inference_mode():
        outputs = [text_tower(model)(TOKENS, use_cache=False).last_hidden_state for model in (result, by_hand)]
    torch.testing.assert_close(*outputs)


def test_values_of_slices_hold_for_the_language_models_layers_alone(tmp_path: Path) -> None:
    one, other = two("qwen2_vl", tmp_path)
    parts = [[source(one, i, i + 1), source(other, i, i + 1, weight=0.25 + i / 2)] for i in range(2)]
    merge = opened(sliced("task_arithmetic", *parts, base_model=str(one)))
    assert not isinstance(merge, Stack)
    weights = {name: merge.parameters(name)["weight"][0] for name in merge.layout}
    layers = layers_of("one", weights)
    for i, value in enumerate((0.25, 0.75)):
        assert {weights[layers.name(i, suffix)] for suffix in layers.tensors[i]} == {value}
    assert {weights[name] for name in layers.before} == {0.25} and {weights[name] for name in layers.after} == {0.75}
    assert {"visual.blocks.1.attn.qkv.weight", "model.embed_tokens.weight"} <= {*layers.before}
    assert {*layers.after} == {"model.norm.weight", "lm_head.weight"}


def test_a_guided_stack_moves_the_language_models_layers(home: Path, tmp_path: Path) -> None:
    one, other = two("qwen2_vl", tmp_path)
    for model in (one, other):
        write_tokenizer(model)
    data = sliced(
        "ties",
        *([source(one, i, i + 1), source(other, i, i + 1)] for i in (0, 1, 1)),
        base_model=str(one),
        lewis={"calibrations": {"words": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
    )
    recipe = parse(data)
    base, experts = pipeline.fetch(recipe)
    _, allocated = pipeline.guide(recipe, base, experts)
    assert allocated is not None and allocated.stacked
    [own] = allocated.experts().values()
    differences = {key: value for key, value in own.differences.items() if "down_proj" in key}
    assert {*differences} == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    first, second, third = differences.values()
    assert first != second == third
    pipeline.prepare_merge(recipe, base, experts, allocated).run(tmp_path / "out")
    assert len(text_tower(loaded("qwen2_vl", tmp_path / "out")).layers) == 3


def test_a_tower_below_the_language_models_own_prefix_is_no_part_of_its_output() -> None:
    names = ["model.layers.0.w", "model.vision_tower.blocks.0.w", "model.vision_tower.norm.weight", "mm.0.w"]
    layers = layers_of("llava", [*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.bias"])
    assert layers.prefix == "model.layers." and layers.after == ("model.norm.weight", "lm_head.bias")


def test_a_language_model_at_the_root_is_found_next_to_a_tower() -> None:
    """Its embedding was looked for under a name that began with a dot."""
    names = ["embed_tokens.weight", "layers.0.w", "vision_tower.layers.0.w", "vision_tower.norm.weight", "norm.weight"]
    layers = layers_of("root", names)
    assert layers.prefix == "layers." and layers.after == ("norm.weight",)


def test_a_text_config_that_leaves_out_what_is_as_usual_is_written_out(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "num_hidden_layers": 26}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = restacked(config, tmp_path, [[Origin("m", tmp_path, config, i, 26)] for i in (4, 5, 6)])
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert found["text_config"].items() >= {"num_hidden_layers": 3, "layer_types": kinds}.items()
    assert found["num_hidden_layers"] == 3  # some configs say it twice


def test_a_decoder_without_its_encoder_is_refused_where_its_config_would_have_to_follow(tmp_path: Path) -> None:
    one, other = two("whisper", tmp_path)
    with pytest.raises(InputError, match="decoder_layers: the model is a decoder made for an encoder; use models"):
        opened(sliced("passthrough", [source(one, 0, 2)], [source(other, 1, 2)]))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_with_a_decoder_is_refused(kind: str, tmp_path: Path) -> None:
    one, other = two(kind, tmp_path)
    for layers in ((0, 2), (1, 2)):
        with pytest.raises(
            InputError, match=r"one: slices need .*got (model.)?decoder.* list the models under `models`"
        ):
            opened(sliced("linear", [source(one, *layers, weight=1), source(other, *layers, weight=1)]))
