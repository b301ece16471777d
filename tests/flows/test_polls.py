"""What a person sees of polls that find something wrong, and of runs that fail: a verdict."""

import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelling, Crashed, Running

from lewis import store
from lewis.errors import LewisError, TransientError
from lewis.registry.releases import Held
from lewis.registry.tracking import AwayError
from lewis.store import runs
from lewis_flows import approval, polls, prefect_runs, release_event, watch
from lewis_flows.service import orphaned_runs, status_data
from lewis_flows.service.status_data import Part, Status
from lewis_flows.service.status_text import as_text
from lewis_flows.service.webhook import Loop
from lewis_flows.turn import mark_crashed, tag_crashed_runs
from lewis_flows.watch import WatchReport
from lewis_tasks.support import flow_run
from lewis_tasks.support.failures import says_why


@pytest.fixture
def client(prefect_url: str, home: Path) -> Iterator[SyncPrefectClient]:
    settings: dict[Any, Any] = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


def test_what_is_wrong_is_logged_and_notified_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is a poll a minute."""
    notified, changes = list[dict[str, str]](), list[bool]()
    monkeypatch.setattr(release_event, "announce_problems", notified.append)
    bad, away = WatchReport(checked=["good"], problems={"bad": "models: missing"}), TransientError("no MLflow")
    ends: list[WatchReport | Exception] = [bad, bad, away, away, WatchReport(checked=["good"])]

    def end() -> WatchReport:
        if isinstance(ended := ends.pop(0), Exception):
            raise ended
        return ended

    monkeypatch.setattr(watch, "poll", end)
    with caplog.at_level(logging.INFO):
        for code in (status_data.UNKNOWN, None):
            for _ in range(4 if code else 1):
                changes.append(watch.poll_all())
            found = Status(parts=[], polled=polls.last())
            assert [each.code for each in status_data.problems(found, datetime.now(UTC))] == ([code] if code else [])
    assert notified == [{"bad": "models: missing"}, {"": "no MLflow"}]
    assert changes == [True, False, True, False, True]
    told = ["bad cannot be watched: models: missing", "the recipes cannot be watched: no MLflow"]
    assert caplog.messages == [*told, "all recipes can be watched again"]
    prefect = Part(name="Prefect", up=True, state="answers")
    text = as_text(Status(parts=[prefect], polled=polls.last()), datetime.now(UTC))
    assert "last looked 0 s ago" in text and "at 1 recipe" in text


def test_a_champion_that_was_moved_by_hand_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of all recipes named the one before until the next merge ended."""
    aliases: dict[str, tuple[str, ...]] = {"1": ("champion",), "2": (), "3": ()}

    def poll() -> WatchReport:
        waits = {"2": "passed", "1": "passed"}
        held = [Held(number, "", waits.get(number, "waiting"), named, {}) for number, named in aliases.items()]
        polls.note_missed({}, {"a": held}, ["a"])
        return WatchReport()

    monkeypatch.setattr(watch, "poll", poll)
    assert watch.poll_all() and not watch.poll_all()
    aliases |= {"1": ("previous",), "2": ("champion",)}
    assert watch.poll_all() and not watch.poll_all()
    aliases["3"] = ("challenger",)
    assert watch.poll_all() and not watch.poll_all() and polls.champions() == {"a": ("2", "3")}
    polls.note_missed({}, {}, ["b"])
    assert polls.champions() == {}


def test_of_several_receivers_one_polls(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polled = list[int]()
    monkeypatch.setattr(watch, "poll_all", lambda: polled.append(1))
    with store.SharedLock("poll"):
        other = threading.Thread(target=watch.poll_once)  # locks of one thread are one lock
        other.start()
        other.join()
    assert polled == []
    assert not watch.poll_once()
    assert polled == [1]


@pytest.mark.timeout(60)
def test_a_poll_comes_to_an_end_with_a_remote_half(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    monkeypatch.setattr(watch, "poll_all", lambda: True)
    assert watch.poll_once() and watch.poll_once()


def test_a_loop_goes_on_after_an_error_until_it_is_stopped() -> None:
    done = threading.Semaphore(0)

    def fail() -> None:
        done.release()
        raise RuntimeError("what nobody thought of")

    loop = Loop("test", fail, 0.01)
    assert done.acquire(timeout=60) and done.acquire(timeout=60)
    loop.stop()
    loop._thread.join(60)
    assert not loop._thread.is_alive()
    off = Loop("off", fail, 0)
    off._thread.join(60)
    while done.acquire(blocking=False):
        pass
    assert not off._thread.is_alive()


@pytest.mark.parametrize("error", [AwayError("MLflow is away"), RuntimeError("what nobody thought of")])
def test_only_an_error_that_nobody_thought_of_has_a_traceback(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Semaphore(0)

    def fail() -> None:
        done.release()
        raise error

    loop = Loop("test", fail, 0.01)
    assert done.acquire(timeout=60) and done.acquire(timeout=60)  # the second call comes after the log of the first
    loop.stop()
    (record,) = caplog.records
    assert str(error) in record.message and bool(record.exc_info) == isinstance(error, RuntimeError)


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


def test_a_run_that_is_being_cancelled_has_the_verdict_that_it_ends_with(client: SyncPrefectClient) -> None:
    """It had `cancelling` for ever."""

    @flow(name=prefect_runs.MERGE)
    def merge() -> None:
        """Stands for the merge in the server's records."""

    run = client.create_flow_run(merge, state=Cancelling())
    flow_run.tag_end(merge, run, Cancelling())
    assert client.read_flow_run(run.id).tags == ["verdict:cancelled"]


def test_a_run_that_somebody_deleted_stops_nobody_who_would_end_it(client: SyncPrefectClient) -> None:
    """The runs after it were left as they were."""

    @flow(name=prefect_runs.MERGE)
    def merge() -> None:
        """Stands for the merge in the server's records."""

    run, other = client.create_flow_run(merge, state=Running()), client.create_flow_run(merge)
    note = runs.note_of(str(run.id))
    store.write_text(note, "tiny")
    client.delete_flow_run(run.id)
    mark_crashed(client, run)
    prefect_runs.skip(client, run, other, "the other merges the same")
    approval._lapse(client, run, "nobody answered")
    orphaned_runs._schedule_again(client, run)
    assert not note.exists()
