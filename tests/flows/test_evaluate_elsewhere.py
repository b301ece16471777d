"""Evaluations in a work queue of their own: when a run is started, what is told of its end, and what it is given."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled, State

from lewis.errors import InputError, LewisError
from lewis.evaluation import step, work_queue
from lewis.recipe.recipe import Recipe
from lewis.steps.table import EVALUATE
from lewis_flows import evaluate_elsewhere as elsewhere
from lewis_flows import recipes_folder, walk
from lewis_flows.evaluate import evaluate_flow
from lewis_flows.service import up
from tests.conftest import Family
from tests.flows.conftest import TASK
from tests.support import pipeline

LORA = ["output={kind: lora, rank: 4}", "exclude=[norm]"]  # it saves the embedding whole, to which the head is tied
TINY = {"recipe": "tiny", "task": "words.yaml"}
LATE = Scheduled().model_copy(update={"name": "Late"})


class Server:
    """Stands for Prefect's client: gives a run in one state after another; an error among them is raised."""

    def __init__(self, *answers: State | BaseException) -> None:
        self.run = FlowRun(id=uuid4(), flow_id=uuid4(), name="evaluate tiny")
        self.answers, self.set, self.pool = list(answers), list[str](), "lewis"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read_flow_run(self, run: UUID) -> FlowRun:
        assert run == self.run.id
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return self.run.model_copy(update={"state": answer})

    def read_deployment_by_name(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(work_pool_name=self.pool)

    def set_flow_run_state(self, run: UUID, state: State) -> None:
        assert run == self.run.id
        self.set.append(state.type.value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Server]:
    """Let the next run be answered so; gives the server."""

    def answer(*answers: State | BaseException) -> Server:
        server = Server(*answers)
        monkeypatch.setattr(elsewhere, "run_deployment", lambda *_, **__: server.run)
        monkeypatch.setattr(elsewhere, "get_client", lambda **_: server)
        monkeypatch.setattr(elsewhere, "POLL", 0.0)
        return server

    return answer


@pytest.mark.parametrize(
    "end, told",
    [
        (Failed(message="org/math: the Hub refuses"), "failed: org/math: the Hub refuses"),
        (Cancelled(), "was cancelled: Cancelled"),
        (ObjectNotFound(Exception()), "was deleted"),
    ],
)
def test_how_a_run_has_ended_is_told(started: Callable[..., Server], end: Any, told: str) -> None:
    started(Scheduled(), Running(), httpx.ConnectError("away"), Running(), end)
    with pytest.raises(LewisError, match=f"the run evaluate tiny in the work queue gpu {told}"):
        elsewhere._run("gpu", [TINY])


def test_a_server_that_stays_away_is_not_asked_for_ever(
    started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_SERVER_WAIT_SECONDS", "0")
    started(Running(), httpx.ConnectError("away"), Completed())
    with pytest.raises(LewisError, match="does not say how the run evaluate tiny in the work queue gpu goes on: away"):
        elsewhere._run("gpu", [TINY])


def test_a_run_that_dies_is_started_again_twice(
    started: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    dead = Crashed(message="Its heartbeats stopped")
    server = started(Running(), dead, Running(), dead, Scheduled(), Completed())
    elsewhere._run("gpu", [TINY])
    assert not server.answers and caplog.text.count("died; starting it again: Its heartbeats stopped") == 2
    server = started(dead, dead, dead, Completed())
    with pytest.raises(LewisError, match="in the work queue gpu died 3 times: Its heartbeats stopped"):
        elsewhere._run("gpu", [TINY])
    assert len(server.answers) == 1


def test_each_task_has_a_run_and_all_are_started_before_one_is_waited_for(
    started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, names = started(Running(), Completed(), Completed()), list[tuple[str, int]]()

    def start(*_: Any, flow_run_name: str, **__: Any) -> FlowRun:
        names.append((flow_run_name, len(server.answers)))
        return server.run

    monkeypatch.setattr(elsewhere, "run_deployment", start)
    elsewhere._run("gpu", [TINY, {**TINY, "task": "gsm8k"}])
    assert names == [("evaluate tiny: words", 3), ("evaluate tiny: gsm8k", 3)] and not server.answers
    server = started(Completed(), Failed(message="no"))
    with pytest.raises(LewisError, match="failed: no"):
        elsewhere._run("gpu", [TINY, {**TINY, "task": "gsm8k"}])
    server = started(Running(), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        elsewhere._run("gpu", [TINY, {**TINY, "task": "gsm8k"}])
    assert server.set == ["CANCELLING", "CANCELLING"]


def test_if_a_run_cannot_be_started_those_before_it_are_cancelled(
    started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They went on without a merge that waits for them, and kept their workers."""
    server = started()
    answers = Mock(side_effect=[server.run, server.run, httpx.ConnectError("away")])
    monkeypatch.setattr(elsewhere, "run_deployment", answers)
    with pytest.raises(LewisError, match="takes no run for the work queue gpu: away"):
        elsewhere._run("gpu", [TINY, TINY, TINY])
    assert server.set == ["CANCELLING", "CANCELLING"]


def test_a_run_that_no_worker_takes_is_told_once(
    started: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = started(Scheduled(), LATE, LATE, Running(), Completed())
    with caplog.at_level(logging.WARNING):
        elsewhere._run("gpu", [TINY])
    (line,) = [each.getMessage() for each in caplog.records if "worker" in each.getMessage()]
    assert "`--work-queue gpu`" in line and server.set == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit()])
def test_who_is_interrupted_cancels_the_run(started: Callable[..., Server], interruption: BaseException) -> None:
    server = started(Running(), interruption)
    with pytest.raises(type(interruption)):
        elsewhere._run("gpu", [TINY])
    assert server.set == ["CANCELLING"]


def test_a_server_without_the_deployment_is_told(
    started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ObjectNotFound(Exception())

    monkeypatch.setattr(started(), "read_deployment_by_name", missing)
    with pytest.raises(LewisError, match=r"no deployment evaluate/evaluate.*`lewis deploy`"):
        elsewhere._run("gpu", [TINY])


def test_a_deployment_in_another_pool_is_told(started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run there could wait for the merge that waits for it, or have no GPU."""
    monkeypatch.setenv("LEWIS_EVALUATE_POOL", "scoring")
    server = started(Failed(message="no"))
    with pytest.raises(
        LewisError, match=r"expected .* in the work pool scoring, but it is in lewis; run `lewis deploy`"
    ):
        elsewhere._run("default", [TINY])
    server.pool = "scoring"
    with pytest.raises(
        LewisError, match="the run evaluate tiny in the work queue default of the work pool scoring failed"
    ):
        elsewhere._run("default", [TINY])


def test_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    inside, outside = tmp_path / "tiny.yaml", tmp_path / "other" / "tiny.yaml"
    assert elsewhere.queue_for(inside) == ""
    monkeypatch.setenv("LEWIS_EVALUATE_QUEUE", " gpu ")
    assert (elsewhere.queue_for(inside), elsewhere.queue_for(outside)) == ("gpu", "")
    assert step.scoring_devices() == ("cuda", "cpu")
    assert up._worker()[-2:] == ["--work-queue", "default"]  # it does not take what its own merges wait for
    monkeypatch.setenv("LEWIS_EVALUATE_POOL", "lewis")  # the pool of the merges is none of its own
    monkeypatch.delenv("LEWIS_EVALUATE_QUEUE")
    assert elsewhere.queue_for(inside) == ""
    monkeypatch.setenv("LEWIS_EVALUATE_POOL", "evaluate")
    assert (elsewhere.queue_for(inside), elsewhere.queue_for(outside)) == ("default", "")
    assert step.scoring_devices() == ("cuda", "cpu")
    monkeypatch.setenv("LEWIS_EVALUATE_POOL", "a b")
    with pytest.raises(InputError, match=r"LEWIS_EVALUATE_POOL: expected the name of a work pool, .* got 'a b'"):
        work_queue.pool()
    monkeypatch.setenv("LEWIS_EVALUATE_QUEUE", "a/b")
    with pytest.raises(InputError, match=r"LEWIS_EVALUATE_QUEUE: expected the name .* got 'a/b'"):
        work_queue.queue()


def test_scores_of_different_devices_are_not_mixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two models, one has scores of both, one of a CPU alone: then those of a CPU count."""
    there = {("a", "cpu"), ("a", "cuda"), ("b", "cpu")}
    monkeypatch.setattr(step, "find_score", lambda _, key, *rest: rest[-1] if (key, rest[-1]) in there else None)
    monkeypatch.setenv("LEWIS_EVALUATE_QUEUE", "gpu")
    settings = step.EvalSettings(("words",), tmp_path)
    models = {"base": ("org/a", "a"), "merged": ("merged", "b")}
    assert step.find_all_scores(models, settings) == {"base": "cpu", "merged": "cpu"}
    there.remove(("a", "cpu"))
    assert step.find_all_scores(models, settings) is None


def test_the_mark_is_compared_task_by_task_in_the_format_of_the_merged_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Workers of two kinds may share the tasks of a merge; and scores on all documents do for a look at some."""
    there = {("merged", "a", "cpu", 32), ("merged", "b", "cuda", 32), ("mark", "a", "cpu", 32)}
    there |= {("mark", "b", "cuda", None), ("mark", "b", "cpu", 32)}

    def find(_: str, key: str, settings: step.EvalSettings, device: str) -> object:
        at = (key, settings.tasks[0], device, settings.look)
        return at if at in there else None

    monkeypatch.setattr(step, "find_score", find)
    monkeypatch.setenv("LEWIS_EVALUATE_QUEUE", "gpu")
    settings = step.EvalSettings(("a", "b"), tmp_path, look=32)
    found = step.find_comparable("models:/m/1", "mark", "merged", settings)
    assert found == [("mark", "a", "cpu", 32), ("mark", "b", "cuda", None)]
    there.remove(("mark", "b", "cuda", None))
    assert step.find_comparable("models:/m/1", "mark", "merged", settings) is None


def test_the_furthest_look_is_found_where_tasks_were_scored_on_different_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = {(task, device, look) for look in (32, 64) for task, device in (("a", "cuda"), ("b", "cpu"))}
    monkeypatch.setattr(
        step, "find_score", lambda _, __, settings, device: (settings.tasks[0], device, settings.look) in there
    )
    monkeypatch.setenv("LEWIS_EVALUATE_QUEUE", "gpu")
    settings = step.EvalSettings(("a", "b"), tmp_path)
    assert step.furthest_look("merged", "key", settings) == 64
    there.add(("a", "cuda", 128))
    assert step.furthest_look("merged", "key", settings) == 64  # b was not scored on so many
    there |= {("a", "cpu", None), ("b", "cuda", None)}
    assert step.furthest_look("merged", "key", settings) is None
    there.clear()
    assert step.furthest_look("merged", "key", settings) is None


@pytest.mark.usefixtures("scores_here")
@pytest.mark.parametrize("output", [pytest.param([], id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.long)])
def test_the_run_scores_what_the_merge_names_and_only_then(
    output: list[str], recipe: Path, home: Path, family: Family, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow in this process, for a base, a merged model or adapter, and a worker that lacks something."""
    monkeypatch.setenv("LEWIS_RECIPES", str(recipe.parent))
    monkeypatch.setenv("LEWIS_EVALUATE_QUEUE", "gpu")
    (recipe.parent / "again.yaml").write_text(TASK.replace("task: words", "task: again"))
    overrides = ["lewis=null", "register=null", "evaluate.baselines=[base]", *output]
    overrides += ["evaluate.tasks=[words.yaml, again.yaml]"]
    plan = Recipe.load(recipe, overrides)
    base, experts = pipeline.fetch(plan)
    assert base is not None
    merged = pipeline.merge(plan, base, experts)
    assert plan.evaluate is not None
    tasks = step.lm_eval.tasks_digest(step.EvalSettings.of(plan.evaluate, plan.root))
    runs: list[dict[str, Any]] = []

    def run(queue: str, parameters: list[dict[str, Any]]) -> None:
        for each in parameters:
            runs.append(each)
            evaluate_flow(**each)

    monkeypatch.setattr(elsewhere, "_run", run)
    monkeypatch.setattr(elsewhere, "submit", lambda _, entry, what, found: (entry.ref, what, found))
    known = {**pipeline.known(plan, base, experts), "merge experts": merged}
    begun: Any = {name: SimpleNamespace(result=lambda each=each: each) for name, each in known.items()}
    monkeypatch.setattr(walk, "finish", lambda *futures: None)
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        for found in (False, True):
            walked = walk.Walk(plan, begun)
            elsewhere.score(walked, {}, "gpu", plan, "tiny", overrides, tasks, walked.graph.of(EVALUATE))
            assert walked.scores() == {
                label: [(ref, f"{label} {task}", found) for task in ("words", "again")]
                for label, ref in (("base", base.ref), ("merged", "merged"))
            }
        assert [each["task"] for each in runs] == ["words.yaml", "again.yaml"]
        assert all(each["models"] == {"base": base.key, "merged": merged.digest} for each in runs)
        wrong: dict[str, dict[str, Any]] = {
            "not the same on this worker": {"tasks": "another"},
            "expected a recipe that scores 'gone', .* if it was edited": {"models": {"gone": "0" * 64}},
            "does not have the model 00000000": {"models": {"merged": "0" * 64}},
            r"does not have the model \.\./": {"models": {"merged": f"../merged/{merged.digest}"}},
            "expected sha256:0, as where the run began": {"base": "sha256:0"},
            "not the name of a recipe": {"recipe": str(recipe)},
            "cannot change evaluate.allow_code": {"overrides": [*overrides, "evaluate.allow_code_execution=true"]},
        }
        for told, changes in wrong.items():
            with pytest.raises(LewisError, match=told):
                evaluate_flow(**runs[0] | changes)
    assert recipes_folder.find("tiny") == recipe
