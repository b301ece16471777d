"""What a person sees of polls and of runs that fail: a run with a verdict, or none at all."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Completed, Failed, State

from lewis.errors import LewisError
from lewis_flows import polls, prefect_runs
from lewis_flows.service import problems
from lewis_flows.service.status_data import Part, Status
from lewis_flows.service.status_text import as_text
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
    """Stands for the poll in the server's records."""


def test_a_poll_that_found_nothing_new_leaves_no_run(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossed: list[Any] = []
    monkeypatch.setattr(prefect_runs, "of_flows", lambda *_: crossed)

    def stays(state: State, *, scheduled: bool = True) -> bool:
        run = client.create_flow_run(_watch, state=state)
        polls.forget_quiet(_watch, run.model_copy(update={"auto_scheduled": scheduled}), state)
        try:
            return bool(client.read_flow_run(run.id))
        except ObjectNotFound:
            return False

    late = client.create_flow_run(_watch, state=Cancelled())
    crossed.append(late.model_copy(update={"auto_scheduled": True}))
    assert not stays(Completed(name=polls.QUIET))
    with pytest.raises(ObjectNotFound):
        client.read_flow_run(late.id)
    assert stays(Completed(name=polls.QUIET), scheduled=False)
    assert stays(Completed(name="Announced")) and stays(Completed(name="Problems"))
    assert [stays(Failed(message=why)) for why in ("no Hub", "no Hub", "no MLflow")] == [True, False, True]

    found = Status(parts=[], polled=polls.last())
    assert [(each.code, each.text) for each in problems.problems(found)] == [(problems.UNKNOWN, "no MLflow")]
    assert polls.remember(3, {}) and not polls.remember(3, {})
    prefect = Part(name="Prefect", up=True, state="answers")
    told = as_text(Status(parts=[prefect], polled=polls.last()), datetime.now(UTC))
    assert "last looked 0 s ago" in told and "at 3 recipes" in told


def test_a_poll_is_told_by_what_is_new() -> None:
    broken = WatchReport(checked=["good"], problems={"bad": "models: missing\nmore"})
    assert _told(broken, others=True) == ("Problems", "bad: models: missing")
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

    of_run, deadline = FlowRunFilter.model_validate({"id": {"any_": [run.id]}}), time.monotonic() + 20
    while (names := [each.name for each in client.read_task_runs(flow_run_filter=of_run)]) != ["register v3"]:
        assert time.monotonic() < deadline, names
        time.sleep(0.2)
