"""What decides the keys of the steps: raising a version changes the keys of the steps that it is for, and no other."""

import pickle
from collections.abc import Callable
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lewis.allocators import ALLOCATORS
from lewis.inspection import step as inspecting
from lewis.merging import step as merging
from lewis.methods import METHODS
from lewis.progress import silent
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import Node, graph
from lewis.steps.run import begin, run
from lewis.steps.table import ALLOCATE, EVALUATE
from tests.conftest import Family
from tests.lewis.merging.fitting.test_static_fit import mixture
from tests.support.models import parse

SETS = {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}
TASK = (
    "task: words\ndataset_path: json\ndataset_kwargs: {data_files: {test: words.jsonl}}\ntest_split: test\n"
    "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list: [{metric: exact_match}]\n"
)


def recipes(family: Family, folder: Path) -> dict[str, Recipe]:
    """A recipe of each kind: what guides, what fits in each way, slices, a plain merge, an evaluation."""
    (folder / "words.yaml").write_text(TASK)
    (folder / "words.jsonl").write_text('{"q": "w1", "a": "w2"}\n')
    base, math, code = map(str, (family.base, *family.experts))
    both = {"base_model": base, "models": [{"model": math}, {"model": code}]}
    guided = {"calibrations": SETS}
    written = {name: {**SETS["sums"], "continue": 2, "max_tokens": 9} for name in ("math", "code")}
    stack = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in (math, code)]
    found = {
        "guided": both | {"merge_method": "ties", "lewis": guided},
        "activation": both | {"merge_method": "ties", "lewis": guided | {"prune_by": "activation", "aim": {}}},
        "forward": both | {"merge_method": "regmean_forward", "lewis": guided},
        "static": both | {"merge_method": "regmean", "lewis": guided},
        "continued": both | {"merge_method": "regmean", "lewis": {"calibrations": written}},
        "anchored": both | {"merge_method": "regmean", "anchor": {"merge_method": "ties"}, "lewis": guided},
        "sliced": {"merge_method": "passthrough", "slices": stack},
        "plain": both | {"merge_method": "task_arithmetic"},
        "scored": both
        | {
            "merge_method": "linear",
            "base_model": None,
            "evaluate": {"tasks": ["words.yaml"], "baselines": ["experts"]},
        },
    }
    found["scored"]["models"] = [{"model": name, "parameters": {"weight": 1.0}} for name in (math, code)]
    found["continued"]["models"] = [{"model": math, "calibration": "math"}, {"model": code, "calibration": "code"}]
    return {name: parse({k: v for k, v in each.items() if v is not None}, root=folder) for name, each in found.items()}


@pytest.fixture
def nodes(family: Family, home: Path, tmp_path: Path) -> dict[tuple[str, str], tuple[Node, Any]]:
    """(recipe, node) -> the node and its input, of everything before the scores, and of what is scored."""
    found = {}
    for name, recipe in recipes(family, tmp_path).items():
        walked = graph(recipe)
        results = run(walked, *(node.name for node in walked if node.step is not EVALUATE), known=begin(recipe))
        for node in walked:
            if node.when is None:
                found[name, node.name] = node, node.given(results)
    return found


def keys(nodes: dict[tuple[str, str], tuple[Node, Any]]) -> dict[tuple[str, str], str]:
    """The key of each step, for a copy of its input, which has not kept what was prepared of it."""
    return {place: node.step.key(copy(given)) for place, (node, given) in nodes.items() if node.step.cached}


Change = Callable[[pytest.MonkeyPatch], None]


def raised(*places: str) -> Change:
    return lambda monkeypatch: [monkeypatch.setattr(place, "raised") for place in places] and None


def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "ties", replace(METHODS["ties"], origin="lewis-ties 2"))


def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS, "lewis", replace(ALLOCATORS["lewis"], origin="lewis-lewis 2"))


def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("lewis.steps.table", "lewis.merging.prepared"):
        monkeypatch.setattr(f"{place}.default_device", lambda: "cuda")


PREPARED, GRAMS = "lewis.merging.prepared.", "lewis.importance.gram_files.SEMANTICS"
STATIC = {("static", "merge"), ("anchored", "merge"), ("continued", "merge")}
CASES: dict[str, tuple[Change, set[tuple[str, str]]]] = {
    "calibration": (raised("lewis.importance.calibration.SEMANTICS"), {("*", "calibrate")}),
    "continuations": (raised("lewis.importance.continuations.SEMANTICS"), {("*", "continue")}),
    "measure": (raised("lewis.importance.measure.SEMANTICS"), {("*", "measure")}),
    "statistics": (
        raised("lewis.importance.step.GRAMS_SEMANTICS", PREPARED + "GRAMS_SEMANTICS"),
        {("static", "measure"), ("anchored", "measure"), ("continued", "measure"), *STATIC},
    ),
    "densities": (raised("lewis.allocation.densities.SEMANTICS"), {("*", "allocate")}),
    "merge": (raised(PREPARED + "SEMANTICS"), {("*", "merge")}),
    "forward": (raised(PREPARED + "FIT_SEMANTICS"), {("forward", "merge")}),
    "static": (raised(PREPARED + "STATIC_SEMANTICS"), STATIC),
    "stacked experts, which none has": (raised(PREPARED + "STACKED_SEMANTICS"), set()),
    "slices": (raised("lewis.merging.sliced.SEMANTICS"), {("sliced", "merge")}),
    "inspection": (raised("lewis.inspection.step.SEMANTICS"), {("*", "diagnose")}),
    "scores": (raised("lewis.evaluation.harness.lm_eval.SEMANTICS"), {("*", "evaluate")}),
    "the version of a method's package": (
        plugin,
        {("guided", "merge"), ("activation", "merge"), ("anchored", "merge")},
    ),
    "the version of an allocator's package": (allocator, {("guided", "allocate"), ("activation", "allocate")}),
    "the number format of the device": (gpu, {("*", "continue"), ("*", "measure"), ("*", "evaluate"), *STATIC}),
}


@pytest.mark.slow
def test_a_version_changes_the_keys_that_it_is_for_and_no_other(
    nodes: dict[tuple[str, str], tuple[Node, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(nodes)
    assert len(set(before.values())) > 20 and all("/" not in key and "." not in key for key in before.values())
    steps = {place: (place[0], node.step.name) for place, (node, _) in nodes.items()}
    for name, (change, expected) in CASES.items():
        with monkeypatch.context() as changed:
            change(changed)
            now = keys(nodes)
        wanted = {steps[place] for place in before if {("*", steps[place][1]), steps[place]} & expected}
        assert {steps[place] for place in before if now[place] != before[place]} == wanted, name
    assert keys(nodes) == before


def test_stacked_experts_have_a_version_of_their_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, _ = mixture(tmp_path, False, "regmean_forward")
    before = merge.digest
    monkeypatch.setattr(PREPARED + "STACKED_SEMANTICS", "raised")
    assert replace(merge).digest != before


def test_a_step_opens_its_models_once_and_another_process_opens_them_itself(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked, known = graph(recipe := recipes(family, tmp_path)["plain"]), begin(recipe)
    results = run(walked, "inspect", known=known)
    for place, name, node in ((merging, "prepare", "merge experts"), (inspecting, "measured", "diagnose")):
        counted = Mock(wraps=getattr(place, name))
        monkeypatch.setattr(place, name, counted)
        step, given = walked[node].step, walked[node].given(results)
        assert step.find(given) is None
        made = step.make(given, silent, "cuda:1")
        assert step.find(given) == made and step.key(given) and counted.call_count == 1
        other = pickle.loads(pickle.dumps(given))
        assert other == given and set(vars(other)) == {each.name for each in fields(given)}
        assert step.key(other) == step.key(given)


def test_the_densities_of_a_merge_that_is_held_back_have_a_key_of_their_own(
    family: Family, home: Path, tmp_path: Path
) -> None:
    """A run took its record of the densities without the base's activations, and left `aim` out of the merge."""
    walked, known = graph(recipe := recipes(family, tmp_path)["activation"]), begin(recipe)
    aimed = walked["allocate"].given(run(walked, "allocate", known=known))
    plain = replace(aimed, aim=False)
    found = [ALLOCATE.find(each) for each in (aimed, plain)]
    assert [each and bool(each.base) for each in found] == [True, False]
    assert ALLOCATE.key(aimed) != ALLOCATE.key(plain)


def test_a_warning_about_the_method_is_not_found_with_the_densities_of_another(
    family: Family, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`dare_linear` was warned of in a merge by `ties`, and after `rescale: false`, which the warning asks for."""
    density = {"strategy": "depth_gradient", "min": 0.2, "max": 0.9}
    data = {"base_model": str(family.base), "models": [{"model": str(family.math)}], "lewis": {"density": density}}
    rescaling = {"merge_method": "dare_linear"}
    for block in (rescaling, {"merge_method": "ties"}, rescaling | {"parameters": {"rescale": False}}, rescaling):
        caplog.clear()
        recipe = parse(data | block, root=tmp_path)
        run(graph(recipe), "allocate", known=begin(recipe))
        assert ("dare_linear brings each tensor back to its norm" in caplog.text) == (block is rescaling)
