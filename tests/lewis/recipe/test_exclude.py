"""`exclude`: tensors that are copied from the base, whatever the experts hold."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lewis
from lewis.errors import InputError, RecipeError
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import bits, open_merge, parse, rewrite


def without_up(model: Path, folder: Path) -> Path:
    """A copy that lacks one projection, and has another in an odd shape."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return None if "mlp.up" in name else tensor[:3].clone() if "mlp.down" in name else tensor

    return rewrite(model, folder, change)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear", "model_stock"])
def test_excluded_tensors_are_the_bases_own_and_the_rest_is_as_ever(
    method: str, family: Family, tmp_path: Path
) -> None:
    experts = [family.math, without_up(family.code, tmp_path / "odd")]
    parameters = {"weight": 1} if method == "linear" else {}
    keys = {"parameters": parameters, "dtype": "bfloat16"}
    merge = open_merge(method, family.base, experts, exclude=["layers.*.mlp"], **keys)
    merge.run(tmp_path / "out")
    open_merge(method, family.base, [family.math, rewrite(family.code, tmp_path / "odd2", lambda _, t: t)], **keys).run(
        tmp_path / "whole"
    )
    base, out = load_file(family.base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert len(merge.excluded) == 6
    for name, tensor in out.items():
        same = base[name] if ".mlp." in name else whole[name]
        if ".mlp." in name or method != "dare_ties":  # whose draws hang on the model's key, its path here
            assert tensor.dtype == same.dtype and bits(tensor) == bits(same), name


def test_an_expert_without_the_excluded_tensors_passes_all_checks(family: Family, tmp_path: Path, home: Path) -> None:
    """`lewis inspect` and `lewis run` refused it, whose config names them, and `lewis merge` merged it."""
    lacks = rewrite(family.math, tmp_path / "lacks", lambda name, each: None if ".mlp." in name else each)
    data = {"merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(lacks)}]}
    recipe = parse({**data, "exclude": ["mlp"]})
    pipeline.preflight(recipe, *pipeline.pin_all(recipe))
    assert not lewis.inspect(recipe).errors
    for exclude, needed in (["mlp"], True), (["mlp.up"], False):
        recipe = parse({**data, "exclude": exclude})
        with pytest.raises(InputError, match=r"has .*mlp.* that the weights lack|missing, the first is .*mlp"):
            pipeline.preflight(recipe, *pipeline.pin_all(recipe), needed=needed)


def test_a_tied_head_stands_for_the_embedding(family: Family) -> None:
    merge = open_merge("ties", family.base, [family.math], exclude=["lm_head"])
    assert merge.excluded == {"model.embed_tokens.weight"}


def test_a_tied_head_may_be_excluded_and_not_have_values_of_its_own(family: Family) -> None:
    """Checked by the headers alone, where only the config says that the head is tied."""
    data = {
        "merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(family.math)}],
        "exclude": ["lm_head"],
    }  # fmt: skip
    stack = [{"sources": [{"model": str(family.math), "layer_range": [i, 1]}]} for i in (0, 0)]
    filtered = [{"filter": "lm_head", "value": 0.1}, {"value": 1}]
    sliced = {"merge_method": "linear", "slices": stack}
    for each in (data, {key: value for key, value in data.items() if key != "models"} | sliced):
        recipe = parse(each | {"parameters": {"weight": 1}})
        pipeline.preflight(recipe, *pipeline.pin_all(recipe))
        recipe = parse(each | {"parameters": {"weight": filtered}})
        with pytest.raises(RecipeError, match=r"matches only 'lm_head\.weight', .*: filter 'model\.embed_tokens', for"):
            pipeline.preflight(recipe, *pipeline.pin_all(recipe))
    with pytest.raises(RecipeError, match=r"matches only 'lm_head\.weight', which the base ties to"):
        open_merge("ties", family.base, [family.math], parameters={"weight": filtered})


def test_the_digest_tells_what_is_excluded_not_how_it_was_said(family: Family) -> None:
    def digest(*patterns: str) -> str:
        return open_merge("ties", family.base, [family.math, family.code], exclude=list(patterns)).digest

    assert digest("mlp") == digest("mlp.gate", "mlp.up", "mlp.down") != digest("mlp.up")
    assert digest("mlp") != digest()


@pytest.mark.slow
def test_a_guided_merge_allocates_to_the_rest(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    recipe = tmp_path / "r.yaml"
    data = {
        "merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(family.math)}],
        "exclude": ["layers.1.mlp"], "lewis": {"density": {"strategy": "depth_gradient", "budget": 0.5}},
    }  # fmt: skip
    recipe.write_text(json.dumps(data))
    assert main(["allocate", str(recipe), "-o", str(tmp_path / "a.json")]) == 0
    (found,) = json.loads((tmp_path / "a.json").read_text())["experts"].values()
    assert "model.layers.0.mlp.up_proj.weight" in found["densities"]
    assert not any("layers.1.mlp" in name for name in found["densities"]) and found["mean"] == pytest.approx(0.5)
    assert main(["merge", str(recipe), "-o", str(tmp_path / "out")]) == 0
    assert main(["export", str(recipe)]) == 2
    assert "exclude: mergekit has nothing like it" in capsys.readouterr().err
    assert main(["allocate", str(recipe), "-o", str(tmp_path / "a.json"), "--set", "exclude=[layers]"]) == 2
    assert "every covered layer" in capsys.readouterr().err
