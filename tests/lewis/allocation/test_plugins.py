"""Allocators of other packages: named in a recipe as LEWIS's own, and named with their package when they fail."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lewis import allocation
from lewis.allocation.densities import allocate
from lewis.allocators import ALLOCATORS
from lewis.errors import InputError, LewisError, RecipeError
from lewis.models.network.module_tree import Layer
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Density
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import parse
from tests.support.plugins import Install, installing

LOUD = '''
from lewis.allocators import allocator

@allocator("loud", paper="https://example.org")
def loud(layers, evidence, policy):
    """The largest density in the first block, the smallest in all others."""
    return {x.key: policy.max if x.index == 0 else policy.min for x in layers}
'''
LAYERS = [Layer(f"m.{i}.q.weight", i, "q", 10) for i in range(2)]
SETS = {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    with installing(ALLOCATORS, tmp_path, monkeypatch, module="lewis_loud", entry="loud = lewis_loud") as found:
        yield found


def guided(family: Family, **density: Any) -> Recipe:
    models = [{"model": str(path)} for path in family.experts]
    block = {"calibrations": SETS, "density": density}
    return parse({"merge_method": "ties", "base_model": str(family.base), "models": models, "lewis": block})


def given(recipe: Recipe) -> tuple[ModelFiles, list[ModelFiles]]:
    base, experts = pipeline.fetch(recipe)
    assert base is not None
    return base, experts


@pytest.mark.usefixtures("home")
def test_a_recipe_names_one_and_its_version_is_part_of_the_digest(install: Install, family: Family) -> None:
    install(LOUD)
    assert "loud" not in ALLOCATORS
    recipe = guided(family, strategy="loud", min=0.2, max=0.6)
    assert ALLOCATORS["loud"].origin == "lewis-loud 1.2"
    assert recipe.guided and not recipe.measures and not recipe.runs_models
    measured, entry = pipeline.guide(recipe, *given(recipe))
    assert entry is not None and measured == []
    densities = entry.experts()[str(family.math)].densities
    kept = {densities[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2)}
    assert kept == {0.2, 0.6}
    ALLOCATORS["loud"] = ALLOCATORS["loud"].__class__(**{**vars(ALLOCATORS["loud"]), "origin": "lewis-loud 1.3"})
    _, again = pipeline.guide(recipe, *given(recipe))
    assert again is not None and again.digest != entry.digest and again.means == entry.means


@pytest.mark.usefixtures("home")
def test_the_one_of_the_readme_goes_by_its_evidence(install: Install, family: Family) -> None:
    readme = (Path(allocation.__file__).parent / "README.md").read_text()
    source = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "@allocator" in block)
    install(source, entry="squares = lewis_loud")
    recipe = guided(family, strategy="squares", budget=0.5)
    assert recipe.measures and not recipe.measures_base
    _, entry = pipeline.guide(recipe, *given(recipe))
    assert entry is not None
    for each in entry.experts().values():
        order = sorted(each.differences, key=each.differences.__getitem__)
        assert each.mean == pytest.approx(0.5) and len(set(each.densities.values())) > 3
        found = [each.densities[key] for key in order]
        assert found == sorted(found)


@pytest.mark.parametrize(
    "source, entry, expected",
    [
        (
            "1 / 0",
            "loud = lewis_loud",
            r"lewis-loud 1.2: its entry point loud = 'lewis_loud' of the group "
            "lewis.allocators cannot be loaded: ZeroDivisionError",
        ),
        ("", "loud = lewis_loud", "registers no allocator of that name; name the entry point as the allocator"),
        (
            LOUD.replace('"loud"', '"owl"'),
            "loud = lewis_loud",
            "the allocator 'owl' exists already, in lewis",
        ),
        ("", "owl = lewis_loud", "takes a name that there is already, in lewis.allocators; rename its allocator"),
        (LOUD.replace('org")', 'org", evidence="norms")'), "loud = lewis_loud", "expected evidence of nothing, metric"),
    ],
)
def test_one_that_cannot_be_loaded_is_reported_with_its_package(
    install: Install, family: Family, source: str, entry: str, expected: str
) -> None:
    install(source, entry=entry)
    for _ in range(2):  # not only the first time
        with pytest.raises(InputError, match=expected):
            guided(family)


@pytest.mark.parametrize(
    "body, expected",
    [
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        (
            "return {x.key: 0.9 for x in layers}",
            "ValueError: m.0.q.weight: expected a density from 0.3 to 0.8, got 0.9",
        ),
        ("return {x.key: float('nan') for x in layers}", "ValueError: m.0.q.weight: .* to 0.8, got nan"),
        ("return {layers[0].key: 0.5}", "ValueError: m.1.q.weight: .* to 0.8, got None"),
        ("return 5", "TypeError: 'int' object is not iterable"),
    ],
)
def test_what_it_does_wrong_is_reported_with_its_package(install: Install, body: str, expected: str) -> None:
    install(LOUD.replace("return {x.key: policy.max if x.index == 0 else policy.min for x in layers}", body))
    message = rf"lewis.density.strategy: allocator loud of lewis-loud 1\.2 failed: {expected}; repair or uninstall"
    with pytest.raises(LewisError, match=message):
        allocate(LAYERS, [x.tensor for x in LAYERS], Density(strategy="loud"), None)


def test_rounding_errors_beyond_a_bound_are_none(install: Install) -> None:
    install(LOUD.replace("policy.max if", "policy.max + 1e-12 if"))
    found = allocate(LAYERS, [x.tensor for x in LAYERS], Density(strategy="loud"), None)
    assert list(found.densities.values()) == [0.8, 0.3]


def test_an_unknown_name_is_refused_at_its_path(install: Install, family: Family) -> None:
    install(LOUD)
    near = r"lewis.density.strategy: unknown allocator 'lod'; did you mean 'loud'\?; there are lewis, .*, uniform, loud"
    with pytest.raises(RecipeError, match=near):
        guided(family, strategy="lod")
    with pytest.raises(RecipeError, match=r"unknown allocator 'xyzzy'; expected one of depth_gradient, .*loud, owl"):
        guided(family, strategy="xyzzy")
    with pytest.raises(RecipeError, match=r"lewis.density.scale: loud has no use for it; leave it out, or use lewis"):
        guided(family, strategy="loud", scale="rank")
    with pytest.raises(InputError, match=r"there is no allocator 'lod'; install the package that brings it"):
        ALLOCATORS.find("lod")


def test_one_may_empty_the_list_of_layers_that_it_is_given(install: Install) -> None:
    """All of every task vector was kept: the layers counted as ones that no token had reached."""
    body = "found = {}\n    while layers:\n        found[layers.pop().key] = 0.5\n    return found"
    install(LOUD.replace("return {x.key: policy.max if x.index == 0 else policy.min for x in layers}", body))
    found = allocate(LAYERS, [x.tensor for x in LAYERS], Density(strategy="loud"), None)
    assert list(found.densities.values()) == [0.5, 0.5]
