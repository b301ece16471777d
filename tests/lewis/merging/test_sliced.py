"""Slices: layers that stay in place are a merge as any other; others are stacked under new numbers."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lewis.errors import InputError, LewisError
from lewis.merging.run import Merge
from lewis.merging.settings import Expert
from lewis.merging.sliced import Stack
from lewis.merging.step import prepare
from lewis.models.chat_template import template_in
from lewis.models.checkpoint import Checkpoint
from lewis.models.files.folder import INDEX
from lewis.models.layers.stack_config import Origin, restacked
from lewis.models.lora.expert import LoraExpert
from lewis.reports.tables import importance_rows
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import edit_json, open_merge, parse, write_tensors, write_tokenizer
from tests.support.tiny_architectures import tiny

HIDDEN, VOCABULARY = 4, 7
Tensors = dict[str, torch.Tensor]


def write(folder: Path, seed: int, layers: int = 4, *, hidden: int = HIDDEN, **config: Any) -> Path:
    """A model of two matrices in each layer, named as Llama's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{part}.weight": (hidden, hidden) for part in ("self_attn.q_proj", "mlp.up_proj")}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return write_tensors(folder, tensors, **{"num_hidden_layers": layers, "tie_word_embeddings": False, **config})


def opened(data: dict[str, Any]) -> Merge:
    recipe = parse(data)
    base = Checkpoint(Path(recipe.base_model), recipe.base_model) if recipe.base_model else None
    experts = [Expert(entry.model, Checkpoint(Path(entry.model), entry.model)) for entry in recipe.experts]
    return prepare(recipe, base, experts)


def source(model: Path, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {"model": str(model), "layer_range": [first, last], "parameters": parameters}


def sliced(method: str, *slices: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": [{"sources": sources} for sources in slices], **keys}


def merged(data: dict[str, Any], folder: Path, **arguments: Any) -> Tensors:
    opened(data).run(folder, **arguments)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "one", 1), write(tmp_path / "two", 2)


def test_layers_are_stacked_in_shards_with_a_config_that_follows(tmp_path: Path) -> None:
    kinds = [["full", "sliding", "full", "sliding"], ["full", "full", "sliding", "sliding"]]
    one, two = (write(tmp_path / f"m{i}", i, layer_types=kinds[i], mlp_only_layers=[3 * i]) for i in range(2))
    data = sliced("passthrough", [source(one, 0, 3)], [source(two, 1, 4)], [source(one, 2, 3)])
    found = merged(data, tmp_path / "out", max_shard_size=200)
    ours, theirs = (load_file(model / "model.safetensors") for model in (one, two))
    places = [(ours, 0), (ours, 1), (ours, 2), (theirs, 1), (theirs, 2), (theirs, 3), (ours, 2)]
    expected = {name: tensor for name, tensor in ours.items() if "layers" not in name}
    for i, (tensors, layer) in enumerate(places):
        own = {name: tensor for name, tensor in tensors.items() if f".layers.{layer}." in name}
        expected |= {name.replace(f".{layer}.", f".{i}.", 1): tensor for name, tensor in own.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].keys() == found.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 7
    assert config["layer_types"] == ["full", "sliding", "full", "full", "sliding", "sliding", "full"]
    assert config["mlp_only_layers"] == [0, 5]


def test_head_and_last_norm_come_from_the_last_slice(models: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = models
    found = merged(sliced("passthrough", [source(one, 0, 2)], [source(two, 3, 4)]), tmp_path / "out")
    ours, theirs = (load_file(model / "model.safetensors") for model in models)
    assert torch.equal(found["model.embed_tokens.weight"], ours["model.embed_tokens.weight"])
    assert all(torch.equal(found[name], theirs[name]) for name in ("model.norm.weight", "lm_head.weight"))


def test_each_slice_merges_its_layers_with_parameters_of_its_own(models: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = models
    first = [source(one, 0, 3), source(two, 1, 4, weight=[{"filter": "layers.1.", "value": 1}, {"value": [0.5, 0.1]}])]
    data = sliced("task_arithmetic", first, [source(one, 2, 4), source(two, 0, 2)], base_model=str(one))
    data["slices"][1]["parameters"] = {"weight": [{"filter": "mlp", "value": [0.2, 0.4]}]}
    found = merged({**data, "parameters": {"weight": 2.0}}, tmp_path / "out")
    ours, theirs = (load_file(model / "model.safetensors") for model in models)
    # layer -> the base's, the expert's, its weight: the filter is compared with the expert's own name
    places = [(0, 1, 1.0), (1, 2, 0.3), (2, 3, 0.1), (2, 0, 0.2), (3, 1, 0.4)]
    for layer, (old, new, weight) in enumerate(places):
        for part, factor in (("mlp.up_proj", weight), ("self_attn.q_proj", weight if layer < 3 else 2.0)):
            base, expert = ours[f"model.layers.{old}.{part}.weight"], theirs[f"model.layers.{new}.{part}.weight"]
            torch.testing.assert_close(found[f"model.layers.{layer}.{part}.weight"], base + factor * (expert - base))
    base, expert = ours["model.norm.weight"], theirs["model.norm.weight"]
    torch.testing.assert_close(found["model.norm.weight"], base + 2 * (expert - base))


def test_layers_in_place_are_the_same_merge_as_models(models: tuple[Path, Path]) -> None:
    one, two = models
    values = {"density": 0.5, "weight": [{"filter": "mlp", "value": [0.1, 0.4]}, {"value": 1.0}]}
    plain = open_merge("ties", one, [two], own=[values])
    whole = opened(sliced("ties", [source(one, 0, 4), source(two, 0, 4, **values)], base_model=str(one)))
    parts = [[source(one, i, i + 2), source(two, i, i + 2, **values)] for i in (0, 2)]
    parts[0][1]["parameters"] = {**values, "weight": [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 1.0}]}
    parts[1][1]["parameters"] = {**values, "weight": [{"filter": "mlp", "value": [0.3, 0.4]}, {"value": 1.0}]}
    halves = opened(sliced("ties", *parts, base_model=str(one)))
    assert not isinstance(whole, Stack) and not isinstance(halves, Stack)
    assert whole.digest == plain.digest
    for name in plain.layout:
        assert halves.parameters(name)["weight"] == pytest.approx(plain.parameters(name)["weight"])


def test_a_stack_computes_what_one_put_together_by_hand_does(family: Family, tmp_path: Path) -> None:
    data = sliced("passthrough", [source(family.base, 0, 2)], [source(family.math, 0, 2)], dtype="float32")
    opened(data).run(tmp_path / "out")
    by_hand, other = (AutoModelForCausalLM.from_pretrained(path).float() for path in (family.base, family.math))
    by_hand.model.layers.extend(copy.deepcopy(other.model.layers))
    by_hand.model.norm, by_hand.config.num_hidden_layers = other.model.norm, 4
    for i, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = i
    stack = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(3, 13)[None]
    with torch.inference_mode():
        torch.testing.assert_close(stack(tokens).logits, by_hand(tokens).logits)


def test_an_adapter_is_stacked_as_its_weights(family: Family, tmp_path: Path) -> None:
    recipe = parse(sliced("passthrough", [source(family.lora, 1, 2)], [source(family.base, 0, 1)]))
    base = Checkpoint(family.base, "base")
    lora = LoraExpert(base, family.lora, "lora")
    stack = prepare(recipe, None, [Expert(str(family.lora), lora), Expert(str(family.base), base)])
    stack.run(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = [name for name in lora.tensors if ".layers.1." in name and lora.touches(name)]
    assert changed
    for name in changed:
        torch.testing.assert_close(found[name.replace(".1.", ".0.", 1)].float(), lora.read(name).float())


def test_the_tokens_of_all_models_are_in_a_stack(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"m{i}", i, vocab_size=VOCABULARY) for i in range(2))
    for model, word in ((one, "a"), (two, "b")):
        write_tokenizer(model, ["w0", "w1", "w2", word])  # after three special tokens: row 6 is another's
    data = sliced("passthrough", [source(one, 0, 2)], [source(two, 0, 2)])
    with pytest.raises(InputError, match="another vocabulary"):
        opened(data)
    found = merged({**data, "tokenizer_source": "union"}, tmp_path / "out")
    ours, theirs = (load_file(model / "model.safetensors") for model in (one, two))
    embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert torch.equal(embedding[:7], ours["model.embed_tokens.weight"]) and len(embedding) == len(head) == 8
    assert torch.equal(head[:6], theirs["lm_head.weight"][:6]) and torch.equal(head[7], theirs["lm_head.weight"][6])
    assert torch.equal(head[6], ours["lm_head.weight"][6])  # a token that the last model lacks
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 8


def test_what_a_stack_is_made_of_is_in_its_digest(models: tuple[Path, Path]) -> None:
    one, two = models
    stacks = [
        sliced("passthrough", [source(one, 0, 2)], [source(two, first, first + 2)], **keys)
        for first, keys in ((1, {}), (2, {}), (2, {"chat_template": "chatml"}))
    ]
    assert len({opened(each).digest for each in stacks}) == 3


def test_densities_are_those_of_the_results_layers(family: Family, home: Path, tmp_path: Path) -> None:
    data = sliced(
        "ties",
        [source(family.base, 0, 2), source(family.math, 0, 2)],
        [source(family.base, 1, 2), source(family.math, 1, 2)],
        base_model=str(family.base),
        lewis={
            "calibrations": {"words": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}},
            "density": {"budget": 0.5},
            "prune_by": "activation",
            "aim": {"omega": 0.5},
        },
    )
    recipe = parse(data)
    base, experts = pipeline.fetch(recipe)
    _, allocated = pipeline.guide(recipe, base, experts)
    assert allocated is not None and allocated.stacked
    [own] = allocated.experts().values()
    name = "model.layers.{}.mlp.down_proj.weight".format
    assert {key.split(".")[2] for key in own.differences} == {"0", "1", "2"}
    assert own.differences[name(2)] == own.differences[name(1)] != own.differences[name(0)]
    assert own.densities[name(2)] == own.densities[name(1)] and own.mean == pytest.approx(0.5)
    stack = pipeline.prepare_merge(recipe, base, experts, allocated)
    assert isinstance(stack, Stack)
    first, second = stack.maker_of(name(1)), stack.maker_of(name(2))
    assert first is not second and second.parameters(name(2))["density"] == [own.densities[name(1)]]
    assert torch.equal(first.scales(name(1))[0], second.scales(name(2))[0])
    assert torch.equal(first.factors[name(1)], second.factors[name(2)])
    stack.run(tmp_path / "out")
    rows = importance_rows(pipeline.guide(recipe, base, experts)[0], allocated)
    assert rows[-1]["layer"].startswith("result: model.layers.2.")
    uniform = pipeline.prepare_merge(recipe, base, experts, allocated, "uniform")
    assert uniform.parameters(name(2))["density"] == [own.mean]


def with_slices(change: dict[str, Any]) -> Any:
    def slices(one: Path, two: Path) -> dict[str, Any]:
        return {**sliced("passthrough", [source(one, 0, 2)], [source(two, 0, 2)]), **change}

    return slices


WRONG: dict[str, tuple[Any, str]] = {
    "beyond": (lambda a, b: sliced("passthrough", [source(a, 2, 5)]), "layer_range: expected at most 4"),
    "empty": (lambda a, b: sliced("passthrough", [source(a, 2, 2)]), "expected [first, after the last]"),
    "unequal": (lambda a, b: sliced("linear", [source(a, 0, 2), source(b, 0, 1)]), "as many layers of each source"),
    "twice": (lambda a, b: sliced("linear", [source(a, 0, 2), source(a, 2, 4)]), "listed twice in one slice"),
    "no base": (lambda a, b: sliced("ties", [source(b, 0, 2)], base_model=str(a)), "slices[0].sources: the base"),
    "two": (lambda a, b: sliced("passthrough", [source(a, 0, 2), source(b, 0, 2)]), "slices[0].sources: passthrough"),
    "parameter": (
        lambda a, b: sliced("passthrough", [source(a, 0, 2, weight=1)]),
        "slices[0].sources[0].parameters.weight: passthrough has no such parameter",
    ),
    "filter": (
        lambda a, b: sliced("passthrough", [source(a, 0, 2, scale=[{"filter": "o_prj", "value": 1}])]),
        "slices[0].sources[0].parameters.scale[0].filter: 'o_prj' matches no tensor",
    ),
    "adapter": (with_slices({"output": {"kind": "lora", "rank": 2}, "base_model": "ONE"}), "output.kind: layers are"),
    "bases": (
        lambda a, b: {
            "slices": [{"sources": [source(a, 0, 2), source(b, 0, 2)], "base_model": str(b)}],
            **{"merge_method": "ties", "base_model": str(a), "lewis": {"density": {"strategy": "uniform"}}},
        },
        "slices[0].base_model: the lewis block compares all experts with one base",
    ),
    "both": (with_slices({"models": [{"model": "x"}]}), "slices: expected either models or slices"),
    "exclude": (with_slices({"exclude": ["norm"], "base_model": "ONE"}), "exclude: slices of passthrough have no base"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_slice_that_does_not_fit_is_refused(what: str, models: tuple[Path, Path]) -> None:
    data = WRONG[what][0](*models)
    if data.get("base_model") == "ONE":
        data["base_model"] = str(models[0])
    with pytest.raises(InputError) as error:
        opened(data)
    assert WRONG[what][1] in str(error.value)


def test_models_that_cannot_be_stacked_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = models
    wide = write(tmp_path / "wide", 3, hidden=6)
    tied = write(tmp_path / "tied", 4, tie_word_embeddings=True)
    towers = write_tensors(tmp_path / "t", {f"{p}.0.w": torch.ones(2, 2) for p in ("a.layers", "b.layers")})
    cases = [
        (wide, one, "cannot be stacked"),
        (tied, one, "tied to the embedding"),
        (towers, one, "one stack of layers"),
    ]
    for first, last, message in cases:
        with pytest.raises(LewisError, match=message):
            opened(sliced("passthrough", [source(first, 0, 1)], [source(last, 1, 2)]))


def test_a_tied_model_lends_its_embedding_to_the_result_as_the_head(models: tuple[Path, Path], tmp_path: Path) -> None:
    tied = write(tmp_path / "tied", 4, tie_word_embeddings=True)
    found = merged(sliced("passthrough", [source(models[0], 0, 2)], [source(tied, 0, 4)]), tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], load_file(tied / "model.safetensors")["model.embed_tokens.weight"])


def stack_config(places: list[int], other: dict[str, Any] | None = None, **block: Any) -> dict[str, Any]:
    """The config of layers `places` of a model with this config; `other` is merged into each layer."""
    config = {"num_hidden_layers": 6, **block}
    configs = [config, *([] if other is None else [{**config, **other}])]
    origins = [[Origin(str(i), Path("x"), each, p, 6) for i, each in enumerate(configs)] for p in places]
    return restacked(config, Path("x"), origins)


KEPT: dict[str, tuple[list[int], dict[str, Any], dict[str, Any]]] = {
    "letters": ([0, 1, 1], {"hybrid_override_pattern": "M*-M*-"}, {"hybrid_override_pattern": "M**"}),
    "first dense": ([0, 1, 1, 3], {"first_k_dense_replace": 2}, {"first_k_dense_replace": 3}),
    "a rule that holds": ([0, 1, 4, 5], {"decoder_sparse_step": 2}, {"decoder_sparse_step": 2}),
    "other lists": ([0, 1], {"eos_token_id": [1] * 6}, {"eos_token_id": [1] * 6}),
    "one kind": ([3, 4], {"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": 4096}),
    "numbers of attention layers": ([0, 1, 2, 1], {"attn_layer_indices": [1]}, {"attn_layer_indices": [1, 3]}),
    "numbers of sparse layers": ([0, 1, 1], {"moe_layers": [1, 3, 5]}, {"moe_layers": [1, 2]}),
    "all numbers": ([0, 5], {"moe_layers": [*range(6)]}, {"moe_layers": [0, 1]}),
    "sparse between": (
        [0, 1, 4, 4, 5],
        {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 4},
        {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    ),
    "sparse to the end": (
        [0, 1, 5, 5],
        {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
        {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    ),
    "a pattern": ([0, 2, 2, 3], {"block_types": list("rra")}, {"block_types": list("raar")}),
}


@pytest.mark.parametrize("what", KEPT)
def test_the_config_follows_its_layers(what: str) -> None:
    places, block, expected = KEPT[what]
    assert stack_config(places, **block).items() >= {**expected, "num_hidden_layers": len(places)}.items()


def test_the_config_of_a_text_tower_follows() -> None:
    config = {"text_config": {"num_hidden_layers": 6, "layer_types": list("abcdef")}}
    found = restacked(config, Path("x"), [[Origin("m", Path("x"), config, i, 6)] for i in (2, 4)])
    assert found == {"text_config": {"num_hidden_layers": 2, "layer_types": ["c", "e"]}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rule": ({"decoder_sparse_step": 2}, "layer 2 would become layer 1"),
    "shared": ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
    "dense after sparse": ({"first_k_dense_replace": 1, "other": {"first_k_dense_replace": 3}}, "different kinds"),
    "two kinds": ({"layer_types": list("ababab"), "other": {"layer_types": list("bababa")}}, "layer 0 of the result"),
    "no list": ({"layer_types": list("ababab"), "other": {"layer_types": None}}, "expected layer_types with 6 items"),
    "a third sparse": ({"moe_layer_interval": 3, "moe_layer_start_index": 1}, "layer 2 would become layer 1"),
    "sparse by modality": ({"moe_layer_interval": 1, "moe_layer_start_index": [1, 1]}, "moe_layer_start_index"),
    "nested numbers": ({"linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1]}}, "full_attn_layers"),
    "numbers as text": ({"moe_layers_enum": "3,4,5"}, "moe_layers_enum"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_layers_of_another_kind_are_refused(what: str) -> None:
    block, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        stack_config([0, 2], **block)


def test_a_rule_is_written_as_the_list_that_transformers_makes_of_it(tmp_path: Path) -> None:
    config = {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = restacked(config, tmp_path, [[Origin("m", tmp_path, config, i, 4)] for i in (0, 1, 1)])
    assert found["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]


def preflight(*slices: dict[str, Any]) -> None:
    """Check a stack before any work, by headers alone."""
    recipe = parse(sliced("passthrough", *([each] for each in slices)))
    pipeline.preflight(recipe, *pipeline.pin_all(recipe))


UNLIKE: dict[str, tuple[str, tuple[int, int], str]] = {
    "rows for all layers": ("gemma4_text", (1, 2), "'model.embed_tokens_per_layer.weight' has shape "),
    "a first layer of its own": (
        "modernbert-decoder",
        (0, 1),
        "ModernBertDecoderForCausalLM has 'model.layers.2.attn_norm.weight' that",
    ),
    "two layers, two limits": ("bamba", (1, 2), "transformers "),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_a_stack_that_is_not_its_configs_network_is_refused_before_any_work(what: str, tmp_path: Path) -> None:
    kind, last, message = UNLIKE[what]
    tiny(kind).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"slices: with the result's .*num_hidden_layers.*: .*" + re.escape(message)):
        preflight(source(tmp_path, 0, 2), source(tmp_path, *last))


def test_a_stack_is_not_blamed_for_what_its_model_has_otherwise(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    preflight(source(tmp_path, 0, 2), source(tmp_path, 1, 2))
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    tied = {name: each for name, each in tensors.items() if name != "lm_head.weight"}
    lent = write_tensors(tmp_path / "tied", tied, **{**config, "tie_word_embeddings": True})
    preflight(source(tmp_path, 0, 2), source(lent, 1, 2))


@pytest.mark.parametrize("wanted, expected", [("auto", "{{ 2 }}"), ("{{ messages }}", "{{ messages }}")])
def test_the_chat_template_is_replaced(wanted: str, expected: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = models
    three = write(tmp_path / "three", 3)
    for model, template in ((one, "{{ 1 }}"), (two, "{{ 2 }}")):
        (model / "tokenizer_config.json").write_text("{}")
        edit_json(model / "tokenizer_config.json", chat_template=template)
    (three / "chat_template.jinja").write_text("{{ 2 }}\n")
    merge = open_merge("linear", None, [one, two, three], chat_template=wanted)
    assert merge.digest != open_merge("linear", None, [one, two, three]).digest
    merge.run(tmp_path / "out")
    assert template_in(tmp_path / "out") == expected
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
