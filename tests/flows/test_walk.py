"""Walks of one graph agree: the tasks of a run are the steps of the plan, in its order, each with its step's key."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from prefect.cache_policies import CacheKeyFnPolicy

from lewis.errors import BrokenModelError, InputError, LewisError
from lewis.models.hub.pin import Pinned
from lewis.models.source import Source
from lewis.progress import silent
from lewis.recipe.recipe import Recipe
from lewis.registry import tracking
from lewis.steps import plan as plans
from lewis.steps.graph import CHAMPION, resolved
from lewis.steps.plan import make_plan
from lewis.steps.run import begin
from lewis.steps.table import DIAGNOSE, EVALUATE
from lewis_flows import walk as walking
from lewis_flows.walk import Walk
from lewis_tasks.steps import SHOWN, task_of
from tests.conftest import Family
from tests.lewis.steps.test_keys import recipes
from tests.support import pipeline
from tests.support.models import parse

NAMES = ("guided", "activation", "forward", "static", "continued", "anchored", "sliced", "plain", "scored", "champion")


class Ended:
    """A future of a task that has ended."""

    def __init__(self, result: Any) -> None:
        self.result = lambda: result


@pytest.fixture
def recipe(request: pytest.FixtureRequest, family: Family, home: Path, tmp_path: Path) -> Recipe:
    found = recipes(family, tmp_path)
    if request.param != "champion":
        return found[request.param]
    weighed = [{"model": str(path)} for path in family.experts]
    gate = {"metric": "words/exact_match,none"}
    return parse(
        {"merge_method": "ties", "base_model": str(family.base), "models": weighed}
        | {"lewis": {"calibrations": {"s": {"texts": ["w1 w2"], "samples": 1}}}}
        | {"evaluate": {"tasks": ["words.yaml"]}, "register": {"name": "tiny", "gate": gate}},
        root=tmp_path,
    )


@pytest.mark.parametrize("recipe", NAMES, indirect=True)
def test_a_run_does_the_steps_of_the_plan_in_its_order_and_by_their_keys(
    recipe: Recipe, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = pipeline.download(pipeline.pin(str(family.base), Path("/"))) if recipe.register_as else None
    monkeypatch.setattr(plans, "_champion", lambda *_: champion)
    done: list[str] = []
    ended: list[Any] = []

    def submit(task: Any, given: Any, name: str, prefix: str, wait_for: Any = None) -> Ended:
        [node] = [each for each in walk.graph if each.label == name]  # no two have one label
        given = given.unwrap()
        done.append(name)
        assert (task.name, task.timeout_seconds) == (node.step.name, node.step.timeout)
        assert task.retries == (4 if node.step.retries else 0)
        if node.step.cached and node.step.name not in SHOWN:
            assert isinstance(task.cache_policy, CacheKeyFnPolicy)
            key = task.cache_policy.compute_key(SimpleNamespace(), {"given": given}, {})
            assert key == node.step.key(given) and task.persist_result
        before = [each.label for each in walk.graph if each.name in walk.graph.edges(node.name)]
        assert set(before) <= set(done) and str(family.base.parent) not in name
        assert all(future in ended for future in wait_for)  # else, if it failed, the task would wait for ever
        return Ended(None if node.step is EVALUATE else node.step.make(given, silent, "cpu"))

    monkeypatch.setattr(walking, "submit", submit)
    monkeypatch.setattr(walking, "finish", lambda *futures: ended.extend(futures))
    planned = [step.name for step in make_plan(recipe).steps if not step.name.startswith(("register ", "publish "))]
    walk = Walk(recipe, {name: Ended(source) for name, source in begin(recipe).items()})
    walk.go(walk.graph, {CHAMPION: champion})
    assert done == planned and len(done) == len(set(done)) > 3
    again = {step.name: step.state for step in make_plan(recipe).steps if step.name in done}
    assert set(again.values()) <= {"cached", "always"} | ({"to do"} if recipe.evaluate else set())


@pytest.mark.parametrize("recipe", ["champion"], indirect=True)
def test_a_plan_has_the_mark_that_a_run_scores_on_the_documents_of_the_release(recipe: Recipe, home: Path) -> None:
    with tracking.client("x") as client:
        client.create_registered_model("tiny")
        for digest in ("a" * 64, "b" * 64):
            tags = {"lewis.digest": digest, "lewis.mark": "1"}
            client.create_model_version("tiny", str(home), tags=tags, await_creation_for=0)
        for champion, scored in (("1", {"champion"}), ("2", {"champion", "mark"})):
            client.set_registered_model_alias("tiny", "champion", champion)
            assert recipe.evaluate is not None
            drawn = recipe.evaluate.model_copy(update={"documents": "by_release", "limit": 1})
            names = [step.name for step in make_plan(recipe.model_copy(update={"evaluate": drawn})).steps]
            assert {name for name in ("champion", "mark") if f"evaluate {name} words" in names} == scored
            assert "evaluate mark words" not in [step.name for step in make_plan(recipe).steps]


def test_an_input_that_is_wrong_has_no_key_so_that_the_task_itself_reports_it(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Walk(recipes(family, tmp_path)["plain"], {}).graph["merge experts"]
    policy = task_of(node).cache_policy
    assert isinstance(policy, CacheKeyFnPolicy)
    monkeypatch.setattr("lewis.steps.table.prepare_merge", Mock(side_effect=InputError("it does not fit")))
    assert policy.compute_key(SimpleNamespace(), {"given": None}, {}) is None


def test_what_the_inspection_says_of_a_model_comes_before_what_another_task_stumbled_over(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The importance of a model with NaN failed first, and the poll did not learn that only another commit can help."""
    walk = Walk(recipes(family, tmp_path)["guided"], {})
    walk.futures[DIAGNOSE.name] = diagnosed = Mock()

    def finish(*futures: Any) -> None:
        raise BrokenModelError("NaN", "1" * 40) if diagnosed in futures else LewisError("activations are not finite")

    monkeypatch.setattr(walking, "finish", finish)
    with pytest.raises(BrokenModelError):
        walk.go(walk.graph)


def test_an_asset_has_its_page_and_its_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub")
    register = {"name": "tiny", "team": "ops"}
    plan = parse({"merge_method": "ties", "base_model": "b", "models": [{"model": "org/math"}], "register": register})
    pinned = Source("org/math", Pinned("org/math", "org/math", "1" * 40, 0))
    walk = Walk(
        plan, {resolved("org/math"): Ended(pinned), resolved("b"): Ended(Source("b", Pinned("b", "/b", "sha256:2", 0)))}
    )
    found = {
        each: walk._asset(*each).properties for each in (("model", "org/math"), ("model", "b"), ("merged", "ops.tiny"))
    }
    urls = [each.url if each else "" for each in found.values()]
    assert urls[:2] == [f"https://***@hub/org/math/tree/{'1' * 40}", None] and str(urls[2]).endswith(
        "/#/models/ops.tiny?workflowType=machine_learning"
    )
    assert all(each and each.owners == ["ops"] for each in found.values())
