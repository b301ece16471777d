"""Runs that a worker had taken and not begun when it died."""

import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending, Running

from lewis import store
from lewis.store import runs
from lewis_flows import prefect_runs
from lewis_flows.service import orphaned_runs
from lewis_tasks.support import events


@flow(name=prefect_runs.VERIFY)
def _watch() -> None:
    """Stands for the poll."""


@pytest.fixture
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    """Of the tests' server, with the work pool."""
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="lewis", type="process"))
        yield client
        client.delete_work_pool("lewis")


def test_a_run_that_no_worker_can_begin_is_scheduled_again_and_gives_its_slot_back(client: SyncPrefectClient) -> None:
    made = client.create_deployment(
        client.create_flow(_watch), "watch", work_pool_name="lewis", concurrency_limit=1, parameters={}
    )

    def take() -> UUID:
        """As a worker does."""
        run = client.create_flow_run_from_deployment(made)
        client.set_flow_run_state(run.id, Pending())
        return run.id

    def state_of(run: UUID) -> str:
        state = client.read_flow_run(run).state
        return state.name if state else ""

    taken, skipped = take(), take()
    assert [state_of(taken), state_of(skipped)] == ["Pending", "AwaitingConcurrencySlot"]
    client.send_worker_heartbeat("lewis", "another")
    orphaned_runs.give_back("ours")
    assert state_of(taken) == "Pending"  # the other worker may begin it
    orphaned_runs.give_back("another")
    assert state_of(taken) == "Scheduled"
    assert state_of(take()) == "Pending"


def test_what_a_dead_worker_had_taken_is_scheduled_again_while_others_go_on(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed Pending for ten minutes, in which the poll took it for a merge that goes on."""
    made = client.create_deployment(client.create_flow(_watch), "watch", work_pool_name="lewis", parameters={})

    def take(worker: str) -> UUID:
        run = client.create_flow_run_from_deployment(made).id
        client.set_flow_run_state(run, Pending())
        if worker:
            client.update_flow_run_labels(run, {"prefect.worker.name": worker})
            client.set_flow_run_state(run, Pending(name="Submitting"), force=True)
        return run

    def states(*runs: UUID) -> list[str | None]:
        return [client.read_flow_run(each).state_name for each in runs]

    client.send_worker_heartbeat("lewis", "dead", heartbeat_interval_seconds=100)
    client.send_worker_heartbeat("lewis", "alive", heartbeat_interval_seconds=1000)
    of_dead, killed_at_once, of_alive = take("dead"), take(""), take("alive")
    in_cluster, begun = take("dead"), take("dead")
    client.set_flow_run_state(in_cluster, Pending(name="InfrastructurePending"), force=True)
    client.set_flow_run_state(begun, Running(), force=True)
    look = orphaned_runs.DeadWorkers()
    look.look()  # from here on it knows that the server answers
    monkeypatch.setattr(events, "now", lambda _: datetime.now(UTC) + timedelta(seconds=400))
    look.look()  # a server that was away, as far as this process knows, has lost heartbeats of living workers, too
    assert states(of_dead, killed_at_once) == ["Submitting", "Pending"]
    taken, [worker] = (
        client.read_flow_run(of_dead),
        [each for each in client.read_workers_for_work_pool("lewis") if each.name == "dead"],
    )
    assert taken.state and orphaned_runs._took(worker, taken)
    taken.state.timestamp += timedelta(seconds=301)  # by another worker, which has given it no label of its own yet
    assert not orphaned_runs._took(worker, taken)
    monkeypatch.setattr(orphaned_runs, "_BACK", 0.0)
    look.look()
    assert states(of_dead, killed_at_once) == ["Scheduled", "Scheduled"]
    assert states(of_alive, in_cluster, begun) == ["Submitting", "InfrastructurePending", "Running"]


def test_the_worker_of_a_machine_gets_back_what_it_had_taken_while_others_go_on(client: SyncPrefectClient) -> None:
    made = client.create_deployment(client.create_flow(_watch), "watch", work_pool_name="lewis", parameters={})
    mine, of_another = (client.create_flow_run_from_deployment(made, state=Pending()).id for _ in range(2))
    client.send_worker_heartbeat("lewis", "another")
    for run, worker in ((mine, "ours"), (of_another, "another")):
        client.update_flow_run_labels(run, {"prefect.worker.name": worker})
    orphaned_runs.give_back("ours")
    assert [client.read_flow_run(each).state_name for each in (mine, of_another)] == ["Scheduled", "Pending"]


def test_a_run_whose_process_died_is_crashed_and_its_note_removed(client: SyncPrefectClient, home: Path) -> None:
    """Its note stayed until the next start of `lewis up`."""
    made = client.create_deployment(client.create_flow(_watch), "watch", work_pool_name="lewis", parameters={})
    dead, alive = (client.create_flow_run_from_deployment(made, state=Running()).id for _ in range(2))
    of_the_user = client.create_flow_run(_watch, state=Running()).id  # by no worker
    client.send_worker_heartbeat("lewis", "ours")
    for run in (dead, alive):
        store.write_text(runs.note_of(str(run)), "")
    process = subprocess.Popen(["sleep", "60"], env={"PREFECT__FLOW_RUN_ID": str(alive), "PATH": os.environ["PATH"]})
    try:
        orphaned_runs.give_back("ours")
    finally:
        process.kill()
        process.wait()
    states = [client.read_flow_run(each).state_name for each in (dead, alive, of_the_user)]
    assert states == ["Crashed", "Running", "Running"]
    assert "verdict:crashed" in client.read_flow_run(dead).tags
    assert [note.name for note in runs.notes()] == [str(alive)]


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_process_that_loads_its_program_is_not_dead(
    known: bool, client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel shows its environment as empty until the program is loaded."""
    made = client.create_deployment(client.create_flow(_watch), "watch", work_pool_name="lewis", parameters={})
    dead, alive = (client.create_flow_run_from_deployment(made, state=Running()).id for _ in range(2))
    client.send_worker_heartbeat("lewis", "ours")
    stat = "{} (a (b)) {} 1 1 1 0 -1 {} " + "0 " * 40 + "{} {} 0"  # state, flags, start and end of the environment
    processes = {"self": (b"A=b", ""), "7": (b"", stat.format(7, "S", 0, 0, 0)), "8": (b"", "")}
    processes |= {"9": (b"", stat.format(9, "Z", 0, 0, 0)), "10": (b"", stat.format(10, "S", 1 << 21, 0, 0))}
    processes |= {"11": (b"", stat.format(11, "R", 0, 77, 77)), "12": (b"A=b\0", "")}
    for name, (environment, text) in processes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "environ").write_bytes(environment)
        if text:  # 8 ends between the two looks
            (tmp_path / name / "stat").write_text(text)
    loaded = threading.Timer(0.3, (tmp_path / "7" / "environ").write_text, [f"A=b\0PREFECT__FLOW_RUN_ID={alive}\0"])
    monkeypatch.setattr(orphaned_runs, "_PROCESSES", tmp_path)
    if known:
        loaded.start()
    else:
        monkeypatch.setattr(orphaned_runs, "_PATIENCE", 0.2)
    orphaned_runs.give_back("ours")
    states = [client.read_flow_run(each).state_name for each in (dead, alive)]
    assert states == ["Crashed" if known else "Running", "Running"]


def test_a_server_that_does_not_answer_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), caplog.at_level(logging.INFO):
        orphaned_runs.give_back("ours")
    assert "what the worker had taken is left as it is: ConnectError" in caplog.messages
