"""A fit that is pulled towards a merge by another method."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lewis.merging.run import Merge
from lewis.recipe.recipe import Recipe
from tests.conftest import Family
from tests.lewis.merging.fitting.test_fit import recipe_of
from tests.support import pipeline
from tests.support.models import parse

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]
METHODS = ["regmean", "regmean_forward"]
SOME = [pytest.param("regmean", marks=pytest.mark.long), "regmean_forward"]
TIES: dict[str, Any] = {"merge_method": "ties", "parameters": {"density": 0.5, "lambda": 1.3}}


def prepare(recipe: Recipe) -> Merge:
    base, experts = pipeline.fetch(recipe)
    assert base is not None
    return pipeline.prepare_merge(recipe, base, experts, pipeline.guide(recipe, base, experts)[1])


def run(recipe: Recipe, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    prepare(recipe).run(folder, **options)
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def alone(base: Path, experts: list[Path], method: str, **blocks: Any) -> Recipe:
    return parse(
        {"merge_method": method, "base_model": str(base), "models": [{"model": str(e)} for e in experts], **blocks}
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_large_ridge_gives_the_anchor_and_what_is_not_fitted_is_it(
    method: str, family: Family, tmp_path: Path
) -> None:
    anchor = run(alone(family.base, family.experts, "ties", parameters=TIES["parameters"]), tmp_path / "a")
    near = run(
        recipe_of(family.base, family.experts, method, parameters={"ridge": 1e9}, anchor=TIES), tmp_path / "near"
    )
    fitted = run(recipe_of(family.base, family.experts, method, anchor=TIES), tmp_path / "fitted")
    assert fitted.keys() == anchor.keys()
    for name, tensor in anchor.items():
        assert torch.allclose(near[name], tensor, atol=1e-5), name
        is_head = "embed" in name and method == "regmean_forward"
        assert torch.equal(fitted[name], tensor) == ("_proj" not in name and not is_head), name


@pytest.mark.parametrize("method", SOME)
def test_the_sum_as_the_anchor_is_no_anchor(method: str, family: Family, tmp_path: Path) -> None:
    plain = run(recipe_of(family.base, family.experts, method), tmp_path / "plain")
    same = recipe_of(family.base, family.experts, method, anchor={"merge_method": "task_arithmetic"})
    assert all(torch.equal(tensor, plain[name]) for name, tensor in run(same, tmp_path / "same").items())


def test_the_weight_scales_what_the_anchor_adds_by_depth(family: Family, tmp_path: Path) -> None:
    """The family has two layers, at depths 0 and 1."""
    base = load_file(family.base / "model.safetensors")
    whole = run(alone(family.base, family.experts, "ties", parameters=TIES["parameters"]), tmp_path / "whole")
    recipe = recipe_of(family.base, family.experts, parameters={"ridge": 1e9}, anchor={**TIES, "weight": [0.0, 0.5]})
    for name, tensor in run(recipe, tmp_path / "half").items():
        weight = 0.5 if ".layers.1." in name else 0.0
        assert torch.allclose(tensor, base[name] + weight * (whole[name] - base[name]), atol=1e-5), name


@pytest.mark.parametrize(
    ("method", "alpha"),
    [
        ("regmean", 1.0),
        ("regmean_forward", 0.5),
        pytest.param("regmean", 0.5, marks=pytest.mark.long),
        pytest.param("regmean_forward", 1.0, marks=pytest.mark.long),
    ],
)
def test_one_expert_comes_out_as_it_is(method: str, alpha: float, family: Family, tmp_path: Path) -> None:
    anchor = {"merge_method": "ties"}  # with density 1 and one expert
    recipe = recipe_of(family.base, [family.math], method, parameters={"alpha": alpha}, anchor=anchor)
    expert = load_file(family.math / "model.safetensors")
    assert all(torch.equal(tensor, expert[name]) for name, tensor in run(recipe, tmp_path / "out").items())


def guided(base: Path, experts: list[Path], method: str = "regmean_forward", **blocks: Any) -> Recipe:
    sets = yaml.safe_load(recipe_of(base, experts).text)["lewis"]["calibrations"]
    density = {"min": 0.2, "max": 0.9, "budget": 0.5}
    lewis = {"calibrations": sets, "prune_by": "activation", "density": density}
    return recipe_of(base, experts, method, **{**blocks, "anchor": {"merge_method": "ties"}, "lewis": lewis})


@pytest.mark.parametrize("method", SOME)
def test_same_bytes_and_digest_for_any_order_and_threads(method: str, family: Family, tmp_path: Path) -> None:
    first = guided(family.base, family.experts, method, parameters={"ridge": 0.1, "alpha": 0.7})
    other = guided(family.base, family.experts[::-1], method, parameters={"ridge": 0.1, "alpha": 0.7})
    expected = run(first, tmp_path / "one", threads=1)
    found = run(other, tmp_path / "two", threads=3)
    assert prepare(first).digest == prepare(other).digest
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_densities_guide_the_anchor_and_say_how_far_a_tensor_may_leave_it(family: Family) -> None:
    merge = prepare(guided(family.base, family.experts, parameters={"ridge": 0.1}))
    name = "model.layers.0.mlp.up_proj.weight"
    densities = [expert.densities[name] for expert in merge.experts if expert.densities]
    assert merge.anchor.parameters(name)["density"] == densities and len(set(densities)) == 2
    assert all(scale is not None for scale in merge.anchor.scales(name))
    assert merge.experts[0].mean_density == pytest.approx(0.5)
    assert merge.parameters(name)["ridge"] == pytest.approx(0.1 * 0.5 / (sum(densities) / 2))


def test_another_ridge_alpha_or_anchor_measures_nothing_again(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe_of(family.base, family.experts, "regmean"), tmp_path / "one")
    monkeypatch.setattr("lewis.importance.grams.measure_grams", lambda *_, **__: pytest.fail("it was measured again"))
    parameters = {"ridge": 1.0, "alpha": 0.5}
    run(recipe_of(family.base, family.experts, "regmean", parameters=parameters, anchor=TIES), tmp_path / "two")


def test_every_part_of_an_anchor_is_in_the_digest(family: Family) -> None:
    recipes = [
        recipe_of(family.base, family.experts),
        recipe_of(family.base, family.experts, anchor=TIES),
        recipe_of(family.base, family.experts, anchor={**TIES, "weight": 0.5}),
        recipe_of(family.base, family.experts, anchor={**TIES, "parameters": {"density": 0.4}}),
        recipe_of(family.base, family.experts, anchor={**TIES, "merge_method": "dare_ties"}),
        guided(family.base, family.experts),
    ]
    assert len({prepare(each).digest for each in recipes}) == len(recipes)
