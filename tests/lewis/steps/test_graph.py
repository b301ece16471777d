"""The graph of a recipe: its order, its edges, what is left out, and how other walks of it agree."""

from pathlib import Path
from typing import Any

import pytest

from lewis.recipe.recipe import Recipe
from lewis.steps import table
from lewis.steps.graph import CHAMPION, PREFLIGHT, graph
from lewis.steps.run import begin, run
from lewis.steps.step import Step
from lewis.steps.table import EVALUATE
from tests.conftest import Family
from tests.support.models import parse

SETS = {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}, "code": {"texts": ["w6 w7"], "samples": 1}}
MODELS = [{"model": "org/math", "calibration": "sums"}, {"model": "org/code", "calibration": "code"}]


def recipe_of(**blocks: Any) -> Recipe:
    return parse({"merge_method": "ties", "base_model": "org/base", "models": MODELS} | blocks)


GUIDED = {"lewis": {"calibrations": SETS}, "evaluate": {"tasks": ["tasks/x.yaml", "mmlu"]}, "register": {"name": "m"}}


def names(recipe: Recipe) -> list[str]:
    return [node.name for node in graph(recipe)]


class TestGraph:
    def test_a_guided_merge_has_every_step(self) -> None:
        found = graph(recipe_of(**GUIDED))
        assert [node.name for node in found] == [
            "download org/base", "download org/math", "download org/code", "inspect", "diagnose",
            "calibrate sums", "calibrate code",
            "measure org/base on sums, code", "measure org/math on sums", "measure org/code on code",
            "allocate", "merge experts", "merge uniform",
            *(f"evaluate {label} {task}" for label in ("base", "math", "code", "uniform", "champion", "merged")
              for task in ("x", "mmlu")),
        ]  # fmt: skip
        steps = {each.name for each in vars(table).values() if isinstance(each, Step)}
        assert {node.step.name for node in found} == steps - {"continue"}
        labels = [node.label for node in found]
        assert labels[:3] == ["download base", "download math", "download code"] and labels[7:9] == [
            "measure base", "measure math"
        ]  # fmt: skip
        assert labels[9:] == ["measure code", *(node.name for node in list(found)[10:])]
        alike = graph(recipe_of(models=[{"model": "org/math"}, {"model": "their/math"}]))
        assert [node.label for node in alike][1:3] == ["download org/math", "download their/math"]

    def test_what_a_recipe_does_not_need_is_left_out(self) -> None:
        plain = recipe_of(models=[{"model": "org/math"}])
        assert names(plain) == ["download org/base", "download org/math", "inspect", "diagnose", "merge experts"]
        fitted = names(recipe_of(merge_method="regmean_forward", lewis={"calibrations": SETS}))
        assert fitted[3:] == ["calibrate sums", "calibrate code", "inspect", "diagnose", "merge experts"]
        static = names(recipe_of(merge_method="regmean", lewis={"calibrations": SETS}))
        assert [name for name in static if name.startswith(("measure", "allocate"))] == [
            "measure org/math on sums", "measure org/code on code",
        ]  # fmt: skip
        assert names(recipe_of(merge_method="regmean", lewis={"calibrations": SETS, "hold_back": True})) == fitted
        models = [{"model": name, "parameters": {"weight": 1}} for name in ("org/math", "org/code")]
        linear = names(parse({"merge_method": "linear", "models": models}))
        assert linear == ["download org/math", "download org/code", "inspect", "diagnose", "merge experts"]

    def test_edges_are_drawn_from_the_stage_before_alone(self) -> None:
        found = graph(recipe_of(**GUIDED))
        assert found.edges("download org/math") == ["resolve org/math", PREFLIGHT]
        assert found.edges("inspect") == ["download org/base", "download org/math", "download org/code"]
        assert found.edges("calibrate sums") == found.edges("diagnose") == ["inspect"]
        assert found.edges("measure org/math on sums") == ["calibrate sums"]
        assert len(found.edges("allocate")) == 3 and found.edges("merge uniform") == ["allocate", "diagnose"]
        assert found.edges("evaluate base x") == found.edges("evaluate merged mmlu") == ["merge experts"]
        assert found.edges("evaluate uniform x") == ["merge uniform"]
        assert set(found.edges("evaluate champion x")) == {CHAMPION, "merge experts"}

    def test_towards_takes_what_a_step_needs_and_is_not_known(self) -> None:
        found = graph(recipe_of(**GUIDED))
        towards = [node.name for node in found.towards("merge experts")]
        assert "diagnose" not in towards and "merge uniform" not in towards and towards[-1] == "merge experts"
        known = {"allocate", "inspect", "download org/base", "download org/math", "download org/code"}
        assert [node.name for node in found.towards("merge experts", known=known)] == ["merge experts"]
        assert [node.name for node in found.towards("evaluate math x")] == ["download org/math", "evaluate math x"]

    def test_tasks_whose_files_have_one_name_are_told_apart(self) -> None:
        found = graph(
            recipe_of(
                models=[{"model": "org/math"}],
                evaluate={"tasks": ["a/x.yaml", "b/x.yaml", "mmlu", "mmlu"], "baselines": []},
            )
        )
        assert [node.name for node in found.of(EVALUATE)] == [
            "evaluate merged a/x.yaml", "evaluate merged b/x.yaml", "evaluate merged mmlu",
        ]  # fmt: skip

    def test_every_node_comes_after_what_it_waits_for(self) -> None:
        for blocks in (GUIDED, {**GUIDED, "merge_method": "regmean", "anchor": {"merge_method": "ties"}}):
            seen = set[str]()
            found = graph(recipe_of(**blocks))
            for node in found:
                assert {name for name in (*node.needs, *node.after) if name in found} <= seen, node.name
                seen.add(node.name)


class TestRun:
    def test_it_stops_at_the_named_steps_and_finds_what_was_done(
        self, family: Family, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = [{"model": str(path), "calibration": "sums"} for path in family.experts]
        recipe = recipe_of(base_model=str(family.base), models=models, lewis={"calibrations": SETS})
        walked, told = graph(recipe), list[str]()
        results = run(walked, "allocate", known=begin(recipe), report=lambda what, done, total: told.append(what))
        assert "merge experts" not in results and results["inspect"] == 14
        assert f"{family.math} on sums" in told and not (home / "merged").exists()
        monkeypatch.setattr("lewis.importance.measure.measure_sets", None)
        merged = run(walked, "merge experts", known=begin(recipe))["merge experts"]
        assert merged.folder.parent == home / "merged"
