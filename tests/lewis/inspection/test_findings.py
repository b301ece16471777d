"""Planted faults: each is told by its name and of its model, and nothing else is; of sound models, nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lewis
from lewis.errors import InputError
from lewis.inspection.configs import Described, config_findings
from lewis.inspection.measures import measure
from lewis.inspection.step import before_download
from lewis.library import inspect as inspect_recipe
from lewis.models.checkpoint import Checkpoint
from lewis.models.source import ModelFiles, pin, pin_all
from lewis.recipe.recipe import Recipe
from lewis.store import kinds
from tests.conftest import Family
from tests.support.damage import damage
from tests.support.models import (
    WORDS,
    edit_json,
    parse,
    rewrite,
    shard,
    write_expert,
    write_llama,
    write_tensors,
    write_tokenizer,
)
from tests.support.quantised import write_quantised

Make = Callable[[Path, Path], Path]
"""Makes a faulty model from a sound expert, in a folder."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a special token and a chat template, and two experts of it; read only."""
    folder = tmp_path_factory.mktemp("inspected")
    base = write_llama(folder / "base", layers=4, hidden=64)
    path = base / "tokenizer.json"
    added = json.loads(path.read_text())["added_tokens"]
    edit_json(path, added_tokens=[*added, {**added[0], "id": 63, "content": "<|im_end|>"}])
    (base / "chat_template.jinja").write_text("{{ messages }}")
    for seed, name in enumerate(("math", "code"), 1):
        write_expert(base, folder / name, seed=seed, scale=0.001)
    return folder


def recipe_of(base: Path, *experts: Path, **keys: object) -> Recipe:
    given = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(e)} for e in experts]}
    return parse(given | keys)


def told(base: Path, *experts: Path, **keys: object) -> set[tuple[str, str]]:
    """(kind, name of the model) of each finding."""
    return {(each.kind, Path(each.model).name) for each in inspect_recipe(recipe_of(base, *experts, **keys)).findings}


def tensors(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Make:
    return lambda expert, folder: rewrite(expert, folder, change)


def files(change: Callable[[Path], object]) -> Make:
    def make(expert: Path, folder: Path) -> Path:
        shutil.copytree(expert, folder)
        change(folder)
        return folder

    return make


def _swap_layers(expert: Path, folder: Path) -> Path:
    stored = load_file(expert / "model.safetensors")
    names = {"layers.1.": "layers.2.", "layers.2.": "layers.1."}
    other = {key: key.replace(old, new) for key in stored for old, new in names.items() if old in key}
    return rewrite(expert, folder, lambda name, tensor: stored[other.get(name, name)])


def _permute_heads(name: str, tensor: torch.Tensor) -> torch.Tensor:
    order = torch.tensor([1, 0, 3, 2])  # of 4 heads of 16 rows
    if name == "model.layers.1.self_attn.q_proj.weight":
        return tensor.reshape(4, 16, -1)[order].reshape(tensor.shape)
    return tensor


def _quantise(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """To 4 bits and back, in groups of 32."""
    if tensor.dim() < 2:
        return tensor
    groups = tensor.reshape(-1, 32)
    scale = groups.abs().amax(dim=1, keepdim=True) / 7
    return ((groups / scale).round() * scale).reshape(tensor.shape)


def _store_in_four_bits(expert: Path, folder: Path) -> Path:
    write_quantised(expert, folder, "int4 packed")
    return folder


def _at(part: str, value: float) -> Make:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        if part in name:
            changed[0, 0] = value
        return changed

    return tensors(change)


def _lose_a_token(folder: Path, lost: str = "<|im_end|>") -> None:
    path = folder / "tokenizer.json"
    kept = [token for token in json.loads(path.read_text())["added_tokens"] if token["content"] != lost]
    edit_json(path, added_tokens=kept)


FAULTS: dict[str, tuple[Make, set[str]]] = {
    "expert twice": (lambda expert, folder: shutil.copytree(expert.parent / "code", folder), {"expert twice"}),
    "expert twice, in other files": (lambda expert, folder: shard(expert.parent / "code", folder), {"expert twice"}),
    "NaN": (_at("layers.2.mlp.up_proj", float("nan")), {"NaN"}),
    "swapped layers": (_swap_layers, {"swapped layers"}),
    "other rope": (
        files(lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
        {"rope"},
    ),
    "rope stretched by the older key": (
        files(lambda f: edit_json(f / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})),
        {"rope"},
    ),
    "missing special token": (files(_lose_a_token), {"special tokens"}),
    "other chat template": (files(lambda f: (f / "chat_template.jinja").write_text("hi")), {"chat template"}),
    "zeroed tensor": (
        tensors(lambda name, tensor: tensor * (0 if "layers.0.mlp.down_proj" in name else 1)),
        {"zeroed tensor"},
    ),
    "half of a tensor zeroed": (
        tensors(lambda name, t: torch.cat([t[:40] * 0, t[40:]]) if "layers.0.mlp.down_proj" in name else t),
        {"zeroed tensor"},
    ),
    "a special token that is text": (files(lambda f: _lose_a_token(f, "<eos>")), {"special tokens"}),
    "half of it quantised": (
        tensors(lambda name, tensor: _quantise(name, tensor) if "mlp" in name else tensor),
        {"quantised"},
    ),
    "another model": (
        lambda expert, folder: write_expert(expert.parent / "base", folder, seed=3, scale=1.0),
        {"wrong base"},
    ),
    "undertrained copy": (
        lambda expert, folder: write_expert(expert.parent / "base", folder, seed=3, scale=1e-6),
        {"undertrained"},
    ),
    "float16 overflow": (_at("layers.1.mlp.up_proj", float("inf")), {"overflow"}),
    "a flipped bit of an exponent": (_at("layers.1.mlp.up_proj", 6.8e36), {"norms"}),
    "quantised": (tensors(_quantise), {"quantised"}),
    "permuted heads": (tensors(_permute_heads), {"permuted heads"}),
    "permuted neurons": (
        tensors(lambda name, tensor: tensor.flip(0) if "layers.3.mlp.up_proj" in name else tensor),
        {"permuted rows"},
    ),
    "other end": (files(lambda f: edit_json(f / "generation_config.json", eos_token_id=5)), {"eos"}),
    "fewer bits": (tensors(lambda name, tensor: tensor.to(torch.bfloat16)), {"dtype"}),
    "quantised, and its config says so": (
        files(lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"})),
        {"no fit"},
    ),
    "quantised, in a format that is read": (
        _store_in_four_bits,
        {"quantised"},
    ),
    "other architecture": (
        lambda expert, folder: write_llama(folder, layers=2, hidden=64),
        {"no fit", "special tokens"},
    ),
    "rescaled tensor": (
        tensors(lambda name, tensor: tensor * (8 if "layers.0.mlp.down_proj" in name else 1)),
        {"norms"},
    ),
    "matrices of another scale": (
        tensors(lambda name, t: t * (1e6 if "mlp" in name else 1e-6 if "o_proj" in name else 1)),
        {"rescaled"},
    ),
    "an embedding of another scale": (
        tensors(lambda name, t: t * (1e6 if "embed_tokens" in name else 1)),
        {"rescaled"},
    ),
    "a norm of another scale": (
        tensors(lambda name, t: t * (1e6 if name == "model.norm.weight" else 1)),
        {"rescaled"},
    ),
    "a matrix of another scale and sign": (
        tensors(lambda name, t: t * (-1e6 if "layers.0.mlp.up_proj" in name else 1)),
        {"rescaled"},
    ),
    "one matrix alone moved, and far": (  # as by an adapter with a large lora_alpha
        lambda expert, folder: rewrite(
            expert.parent / "base", folder, lambda name, t: t * (-3 if "layers.0.mlp.up_proj" in name else 1)
        ),
        {"norms"},
    ),
    "outsized": (
        lambda expert, folder: write_expert(expert.parent / "base", folder, seed=3, scale=0.011),
        {"outsized"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_and_nothing_else(fault: str, models: Path, home: Path, tmp_path: Path) -> None:
    make, expected = FAULTS[fault]
    odd = make(models / "math", tmp_path / "odd")
    assert told(models / "base", models / "code", odd) == {(kind, "odd") for kind in expected}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    ["expert twice", "expert twice, in other files", "swapped layers", "permuted heads", "matrices of another scale"],
)
def test_an_error_stops_a_merge_unless_the_recipe_says_otherwise(
    fault: str, models: Path, home: Path, tmp_path: Path
) -> None:
    odd = FAULTS[fault][0](models / "math", tmp_path / "odd")
    recipe = recipe_of(models / "base", models / "code", odd)
    with pytest.raises(InputError, match=rf"(?s)^error: {odd}: {next(iter(FAULTS[fault][1]))}: .*--force$"):
        lewis.merge(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    forced = [recipe_of(models / "base", models / "code", odd, inspect={"on": on}) for on in ("warn", "off")]
    digests = {lewis.merge(each, tmp_path / "merged").digest for each in forced}
    assert len(digests) == 1 and recipe.blocks == forced[0].blocks


def test_permuted_heads_are_rows_where_layers_have_other_numbers_of_heads(
    models: Path, home: Path, tmp_path: Path
) -> None:
    """The config of OpenELM, whose code is its own, lists the heads of each layer: there was a TypeError."""
    base, math = (shutil.copytree(models / name, tmp_path / name) for name in ("base", "math"))
    for folder in (base, math):
        edit_json(folder / "config.json", model_type="openelm", num_attention_heads=[4] * 4, head_dim=None)
    odd = FAULTS["permuted heads"][0](math, tmp_path / "odd")
    assert told(base, math, odd) == {("permuted rows", "odd")}


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_a_head_of_another_scale_is_an_error(factor: float, home: Path, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", layers=4, hidden=64, tied=False)
    code = write_expert(base, tmp_path / "code", seed=1, scale=0.001)
    odd = tensors(lambda name, t: t * (factor if "lm_head" in name else 1))(code, tmp_path / "odd")
    math = write_expert(base, tmp_path / "math", seed=2, scale=0.001)
    assert told(base, math, odd) == {("rescaled", "odd")}


def test_a_weight_of_the_base_that_a_flipped_bit_made_huge_is_the_base_s_fault(home: Path, tmp_path: Path) -> None:
    def flip(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "layers.0.mlp.up_proj" in name:
            tensor.view(-1)[7] = 1e10
        return tensor

    sound = write_llama(tmp_path / "sound", layers=4, hidden=64)
    experts = [write_expert(sound, tmp_path / name, seed=i, scale=0.001) for i, name in enumerate(("math", "code"))]
    assert told(rewrite(sound, tmp_path / "base", flip), *experts) == {("damaged base", "base")}


def test_a_bias_that_grew_from_next_to_nothing_is_no_error(home: Path, tmp_path: Path) -> None:
    base = write_tensors(
        tmp_path / "base", {"layers.0.a.weight": torch.randn(32, 32), "layers.0.a.bias": torch.full((32,), 1e-6)}
    )
    odd = tensors(lambda name, t: t + 1e-3)(base, tmp_path / "odd")
    assert ("rescaled", "odd") not in told(base, odd)


def test_without_a_base_a_second_copy_of_the_first_is_an_error(models: Path, home: Path, tmp_path: Path) -> None:
    """In other files, too; what differs only in its config is no other model."""
    again = shard(models / "math", tmp_path / "again")
    recipe = parse({"merge_method": "linear", "models": [{"model": str(each)} for each in (models / "math", again)]})
    found = inspect_recipe(recipe).findings
    assert [(each.kind, each.model) for each in found] == [("expert twice", str(again))]
    with pytest.raises(InputError, match=f"^error: {again}: expert twice: its weights are those of "):
        lewis.merge(recipe, tmp_path / "merged")


def test_without_a_base_the_same_files_as_the_first_stop_a_merge_of_three(
    models: Path, home: Path, tmp_path: Path
) -> None:
    again = shutil.copytree(models / "math", tmp_path / "again")
    experts = [{"model": str(each)} for each in (models / "math", again, models / "code")]
    with pytest.raises(InputError, match=f"^error: {again}: expert twice: the same files as "):
        lewis.merge(parse({"merge_method": "linear", "models": experts}), tmp_path / "merged")


def test_one_expert_by_the_same_name_twice_is_found(models: Path) -> None:
    base, math = (Described._at(name, name, models / name, models / name, {}) for name in ("base", "math"))
    assert [each.kind for each in config_findings(base, [math, math])] == ["expert twice"]


def test_copies_of_one_expert_far_from_the_base_are_an_error(models: Path, home: Path, tmp_path: Path) -> None:
    far = write_expert(models / "base", tmp_path / "far", seed=3, scale=0.04)
    again = shard(far, tmp_path / "again")
    found = told(models / "base", far, again)
    assert found == {("far from base", "far"), ("far from base", "again"), ("expert twice", "again")}


def test_what_is_excluded_stops_no_merge(models: Path, home: Path, tmp_path: Path) -> None:
    odd = FAULTS["swapped layers"][0](models / "math", tmp_path / "odd")
    assert lewis.merge(recipe_of(models / "base", models / "code", odd, exclude=["layers"]), tmp_path / "merged").size


def test_of_sound_models_nothing_is_told(models: Path, home: Path, family: Family) -> None:
    found = inspect_recipe(recipe_of(models / "base", models / "math", models / "code"))
    assert found.findings == () and found.verdict == "no findings: these models can be merged"
    assert told(family.base, family.math, family.code) == set()


@pytest.mark.slow
def test_a_wrong_base_and_the_nearest_of_several(models: Path, home: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=7, layers=4, hidden=64)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(models / "base" / name, other / name)
    experts = models / "math", models / "code"
    assert told(other, *experts) == {("wrong base", "math"), ("wrong base", "code")}

    relative = write_expert(models / "base", tmp_path / "relative", seed=5, scale=0.005)
    assert told(relative, *experts) == {("shared origin", "code")}
    found = inspect_recipe(recipe_of(relative, *experts), candidates=[str(models / "base")])
    assert [(each.kind, each.what.split(",")[0]) for each in found.findings] == 2 * [
        ("wrong base", f"it is nearer to {models / 'base'}")
    ]
    assert len(found.refs) == 3  # the other base is in no table


def test_the_dtype_of_the_result_may_be_too_small(models: Path, home: Path, tmp_path: Path) -> None:
    odd = _at("layers.1.mlp.up_proj", 1e5)(models / "math", tmp_path / "odd")
    found = told(models / "base", models / "code", odd, dtype="float16")
    assert ("overflow", "odd") in found and ("overflow", "code") not in found


def test_what_configs_tell_is_told_before_a_download(models: Path, home: Path, tmp_path: Path) -> None:
    odd = FAULTS["other rope"][0](models / "math", tmp_path / "odd")
    again = shutil.copytree(models / "code", tmp_path / "again")
    recipe = recipe_of(models / "base", models / "code", odd, again)
    found = before_download(*pin_all(recipe))
    assert [(each.kind, each.level) for each in found] == [("expert twice", "error"), ("rope", "warning")]
    assert "rope_theta is 1000000.0, in the base 10000.0" in found[1].what


def test_files_next_to_the_weights_do_not_count(models: Path, tmp_path: Path) -> None:
    """A run looks at the models on the disk: it said that an expert was stored in F16, by what an optimizer left."""
    odd = shutil.copytree(models / "math", tmp_path / "odd")
    state = {name: torch.cat([tensor, tensor]).half() for name, tensor in load_file(odd / "model.safetensors").items()}
    save_file({f"state.{name}": tensor for name, tensor in state.items()}, odd / "optimizer.safetensors")
    sharded = ModelFiles.at("", "", shard(odd, tmp_path / "sharded"))
    assert Described.on_disk(ModelFiles.at("", "", odd)).dtype == Described.on_disk(sharded).dtype == "F32"
    whole = set(Described.on_disk(sharded).headers)
    first = min(sharded.folder.glob("model-*.safetensors"))
    lost = set(load_file(first))
    first.write_bytes(b"x")  # damaged: it alone counts as absent
    assert set(Described.on_disk(sharded).headers) == whole - lost < whole


@pytest.mark.parametrize(
    ("named", "ref", "local", "found"),
    [
        ("org/other", "./lora", False, "org/other, not on org/Base"),
        ("org/other", "./lora", True, ""),
        ("org/base", "./lora", False, ""),
        ("org/base", "loras/maths+code", False, ""),  # a folder
        ("org/other", "org/other@main+./lora", False, ""),
        ("org/base", "org/other+./lora", False, "org/base, not on org/other"),
        ("/home/me/base", "./lora", False, ""),
        ("", "./lora", False, ""),
    ],
)
def test_an_adapter_of_another_base_is_named(
    named: str, ref: str, local: bool, found: str, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    commit = "sha256:1" if local else "1"
    base = Described._at("org/Base@v1", commit, models / "base", models / "base", {})
    key = "2+3" if ref.startswith("org/") else f"{commit}+3"
    expert = Described._at(ref, key, models / "base", tmp_path, {})
    told = [each.what for each in config_findings(base, [expert]) if each.kind == "another base"]
    assert [what.partition("trained on ")[2] for what in told] == ([found] if found else [])


def test_an_adapter_of_another_local_base_is_named(family: Family, tmp_path: Path) -> None:
    """But not one whose base was copied or moved, or whose folder is not here."""
    copied = Path(shutil.copytree(family.base, tmp_path / "copied"))
    expected = {family.base: 0, copied: 0, family.math: 1, tmp_path / "gone": 0}
    for number, (trained_on, count) in enumerate(expected.items()):
        adapter = Path(shutil.copytree(family.lora, tmp_path / f"lora-{number}"))
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(trained_on))
        base = pin(str(family.base), tmp_path)
        found = before_download(base, [pin(str(adapter), tmp_path, base)])
        assert [each.what.rpartition("trained on ")[2] for each in found] == [
            f"{family.math}, whose files differ"
        ] * count, found


def test_measures_are_those_of_numpy(tmp_path: Path) -> None:
    """Also where elements are not finite, in all dtypes, and past the end of a block."""
    draw = np.random.default_rng(0)
    base, one, other = (torch.from_numpy(draw.normal(size=(33, 1100)).astype(np.float32)) for _ in range(3))
    one[:, ::2] = base[:, ::2]
    broken = other.clone()
    broken[0, 0], broken[1, 1], broken[-1, -1] = float("nan"), float("inf"), float("nan")
    stored = {"base": base, "one": one, "other": broken.to(torch.float16)}
    folders = [write_tensors(tmp_path / name, {"layers.0.a.weight": t}) for name, t in stored.items()]
    found = measure(*[(opened := [Checkpoint(f, f.name) for f in folders])[0], opened[1:]])
    [tensor] = found.tensors
    read = other.to(torch.float16).to(torch.float32)
    for place in ((0, 0), (1, 1), (-1, -1)):
        read[place] = base[place]
    rows = torch.stack([base, one - base, read - base]).reshape(3, -1).double()
    assert np.triu(tensor.gram) == pytest.approx(np.triu((rows @ rows.T).numpy()), rel=1e-5)
    assert tensor.unchanged == [int((rows[1] == 0).sum()), int((rows[2] == 0).sum())]
    both = (rows[1] != 0) & (rows[2] != 0)
    assert tensor.signs[0][1] == int(both.sum()) and tensor.signs[1][0] == int((rows[1] * rows[2] < 0).sum())
    assert (tensor.nans, tensor.infinities) == ([0, 0, 2], [0, 0, 1])
    assert tensor.peaks == pytest.approx([float(each.abs().max()) for each in (base, one, read)])
    cosine = torch.nn.functional.cosine_similarity(base.double().reshape(-1), read.double().reshape(-1), dim=0)
    assert found.cosine(2) == pytest.approx(float(cosine), rel=1e-5)


def test_tokens_in_another_order_are_told_and_their_rows_not_compared(models: Path, home: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(models / "math", tmp_path / "odd")
    write_tokenizer(odd, WORDS[::-1])
    edit_json(odd / "config.json", vocab_size=63)
    stored = load_file(odd / "model.safetensors")
    stored["model.embed_tokens.weight"] = 30 * torch.randn(63, 64)
    save_file(stored, odd / "model.safetensors", metadata={"format": "pt"})
    assert told(models / "base", models / "code", odd) == {("no fit", "odd"), ("special tokens", "odd")}
    by_token = told(models / "base", models / "code", odd, tokenizer_source="union")
    assert by_token == {("special tokens", "odd")}


def test_experts_that_differ_only_in_what_a_merge_matches_by_token_are_two(
    models: Path, home: Path, tmp_path: Path
) -> None:
    def move(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.01 if "embed_tokens" in name else tensor

    rows, tokens = rewrite(models / "math", tmp_path / "rows", move), shutil.copytree(models / "math", tmp_path / "t")
    write_tokenizer(tokens, [*WORDS[:-1], "other"])
    same = shutil.copytree(models / "math", tmp_path / "same")
    edit_json(same / "config.json", note="other bytes")
    for other, kind in ((rows, "shared origin"), (tokens, "shared origin"), (same, "expert twice")):
        found = told(models / "base", models / "math", other, tokenizer_source="union")
        assert (kind, other.name) in found and len({each for each, _ in found} & {"shared origin", "expert twice"}) == 1


def test_damaged_measures_are_made_again(models: Path, home: Path) -> None:
    recipe = recipe_of(models / "base", models / "math", models / "code")
    first = inspect_recipe(recipe).to_json()
    [path] = kinds.INSPECTIONS.entries()
    damage(path, "cut")
    assert inspect_recipe(recipe).to_json() == first
    assert [each.name.split("-")[0] for each in (home / "quarantine").iterdir()] == ["inspections"]


def test_a_third_expert_that_barely_moved_is_told(models: Path, home: Path, tmp_path: Path) -> None:
    weak = write_expert(models / "base", tmp_path / "weak", seed=3, scale=2e-5)
    assert told(models / "base", models / "math", models / "code", weak) == {("undertrained", "weak")}


def test_an_expert_of_which_only_odd_tensors_moved_is_not_undertrained(
    models: Path, home: Path, tmp_path: Path
) -> None:
    """Of an adapter that moves two projections far, it was said that its weights are the base's."""
    moves = "model.layers.2.mlp.up_proj.weight"
    odd = rewrite(models / "base", tmp_path / "odd", lambda name, t: torch.randn_like(t) if name == moves else t)
    assert told(models / "base", models / "math", models / "code", odd) == {("norms", "odd")}


ROOT = next((each for each in Path(__file__).parents if (each / "shared" / "real").is_dir()), None)
REAL = {
    "three adapters": [f"shared/real/lora-{name}" for name in ("math", "code", "sql")],
    "two full fine-tunes": ["research/full-math", "research/full-code"],
}


@pytest.mark.parametrize("family_of", REAL)
def test_of_real_families_nothing_is_told(family_of: str, home: Path) -> None:
    base = Path(os.environ.get("LEWIS_REAL_BASE") or (ROOT or Path()) / "research" / "base")
    experts = [(ROOT or Path()) / each for each in REAL[family_of]]
    if ROOT is None or not all(each.is_dir() for each in (base, *experts)):
        pytest.skip("the real models are not in ../shared and ../research")
    assert told(base, *experts) == set()
