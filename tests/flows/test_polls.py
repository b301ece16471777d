"""What a person sees of polls and of runs that fail: a run with a verdict, or none at all."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, State

from lewis.errors import LewisError, TransientError
from lewis_flows import polls, prefect_runs, watch
from lewis_flows.service import status_data
from lewis_flows.service.status_data import Part, Status
from lewis_flows.service.status_text import as_text
from lewis_flows.turn import tag_crashed_runs
from lewis_flows.watch import WatchReport, _told
from lewis_tasks.support import flow_run
from lewis_tasks.support.failures import says_why


@pytest.fixture
def client(prefect_url: str, home: Path) -> Iterator[SyncPrefectClient]:
    settings: dict[Any, Any] = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


@flow(name=prefect_runs.WATCH)
def _watch() -> None:
    """Stands for the poll."""


def test_a_poll_leaves_a_run_only_while_something_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: dict[Any, FlowRun] = {}

    def listed(_client: Any, _flows: Any, state: dict[str, dict[str, list[str]]]) -> list[FlowRun]:
        return [run for run in runs.values() if run.state_type and run.state_type.value in state["type"]["any_"]]

    monkeypatch.setattr(prefect_runs, "of_flows", listed)

    def busy(_: Any) -> None:
        raise httpx.ConnectError("no answer")

    server: Any = SimpleNamespace(delete_flow_run=runs.pop)
    monkeypatch.setattr(polls, "get_client", lambda **_: nullcontext(server))

    def left(*states: State, scheduled: bool = True, killed: bool = False) -> list[str | None]:
        """The names of the states of the runs that are left when polls have ended so."""
        for state in states:
            run = FlowRun(flow_id=uuid4(), state=state, state_type=state.type, auto_scheduled=scheduled)
            runs[run.id] = run
            if not killed:
                polls.forget(_watch, run, state)
        return [run.state.name for run in runs.values() if run.state]

    quiet, announced = Completed(name=polls.QUIET), Completed(name=polls.ANNOUNCED)
    polls.remember(2, {})
    assert left(quiet, announced) == []
    assert left(quiet, scheduled=False) == [polls.QUIET]  # somebody wanted to see it
    runs.clear()
    polls.remember(1, {"bad": "models: missing"})
    assert left(Completed(name=polls.PROBLEMS), quiet) == [polls.PROBLEMS]
    assert left(Cancelled(), Crashed(), killed=True) == [polls.PROBLEMS, "Cancelled", "Crashed"]
    assert left(announced) == [polls.PROBLEMS]  # it is still so
    polls.remember(0, {"": "no MLflow"})
    assert left(Failed(message="no MLflow"), quiet) == ["Failed"]

    found = Status(parts=[], polled=polls.last())
    (problem,) = status_data.problems(found, datetime.now(UTC))
    assert (problem.code, problem.text) == (status_data.UNKNOWN, "no MLflow")
    assert polls.remember(3, {}) and not polls.remember(3, {})
    server.delete_flow_run = busy
    assert left(quiet) == ["Failed", polls.QUIET]
    server.delete_flow_run = runs.pop
    assert left(quiet) == []
    prefect = Part(name="Prefect", up=True, state="answers")
    told = as_text(Status(parts=[prefect], polled=polls.last()), datetime.now(UTC))
    assert "last looked 0 s ago" in told and "at 3 recipes" in told


def test_a_poll_that_fails_as_the_one_before_fails_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure is notified, and there is a poll a minute."""

    def away(recipes: list[str] | None) -> Any:
        raise TransientError("no MLflow")

    monkeypatch.setattr(watch, "_watch", away)
    monkeypatch.setattr(flow_run, "is_scheduled", lambda: True)
    ends = [watch.watch_flow.fn(recipes) for recipes in (None, None, None, ["tiny"])]
    assert [state.name for state in ends] == ["Failed", polls.QUIET, polls.QUIET, "Failed"]
    assert ends[0].message == "no MLflow" and "as at the poll before: no MLflow" in ends[1].message
    monkeypatch.setattr(flow_run, "is_scheduled", lambda: False)
    assert watch.watch_flow.fn(None).name == "Failed"


def test_a_poll_is_told_by_what_is_new() -> None:
    broken = WatchReport(checked=["good"], problems={"bad": "models: missing\nmore"})
    assert _told(broken, others=True) == (polls.PROBLEMS, "bad: models: missing")
    assert _told(broken, others=False)[0] == polls.QUIET
    news = WatchReport(checked=["good"], announced=["good: org/math"], problems=broken.problems)
    name, line = _told(news, others=True)
    assert name == "Announced" and line.startswith("good: org/math; recipes checked: 1")


def test_a_run_that_fails_has_a_verdict_and_a_task_the_name_of_what_it_made(client: SyncPrefectClient) -> None:
    @task(task_run_name="register")
    def register() -> None:
        flow_run.name_task("register v3")

    @flow(**flow_run.HOOKS)
    @says_why
    def failing(error: Exception) -> None:
        flow_run.tag(recipe="tiny", verdict="skipped")
        register()
        raise error

    for error in (LewisError("told"), RuntimeError("not thought of")):
        state = failing(error, return_state=True)
        run = client.read_flow_run(state.state_details.flow_run_id)
        assert sorted(run.tags) == ["recipe:tiny", "verdict:failed"]

    of_run, deadline = FlowRunFilter.model_validate({"id": {"any_": [run.id]}}), time.monotonic() + 120
    while (names := [each.name for each in client.read_task_runs(flow_run_filter=of_run)]) != ["register v3"]:
        assert time.monotonic() < deadline, names
        time.sleep(0.2)


def test_a_run_that_the_server_marks_as_crashed_has_a_verdict_too(client: SyncPrefectClient) -> None:
    @flow(name=prefect_runs.MERGE)
    def merge() -> None:
        """Stands for the merge in the server's records."""

    tags = ["lewis", "recipe:tiny", "trigger:release"]
    run = client.create_flow_run(merge, tags=tags, state=Crashed(message="Its heartbeats stopped"))
    for _ in range(2):
        tag_crashed_runs()
        assert sorted(client.read_flow_run(run.id).tags) == [*tags, "verdict:crashed"]
