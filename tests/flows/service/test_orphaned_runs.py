"""Runs that a worker had taken and not begun when it died."""

import os
import subprocess
from collections.abc import Iterator
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending, Running

from lewis_flows import prefect_runs
from lewis_flows.service import orphaned_runs


@flow(name=prefect_runs.WATCH)
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


def test_a_run_whose_process_died_before_it_took_its_turn_is_crashed(client: SyncPrefectClient) -> None:
    made = client.create_deployment(client.create_flow(_watch), "watch", work_pool_name="lewis", parameters={})
    dead, alive = (client.create_flow_run_from_deployment(made, state=Running()).id for _ in range(2))
    of_the_user = client.create_flow_run(_watch, state=Running()).id  # by no worker
    client.send_worker_heartbeat("lewis", "ours")
    process = subprocess.Popen(["sleep", "60"], env={"PREFECT__FLOW_RUN_ID": str(alive), "PATH": os.environ["PATH"]})
    try:
        orphaned_runs.give_back("ours")
    finally:
        process.kill()
        process.wait()
    states = [client.read_flow_run(each).state_name for each in (dead, alive, of_the_user)]
    assert states == ["Crashed", "Running", "Running"]
    assert "verdict:crashed" in client.read_flow_run(dead).tags


def test_nothing_is_said_of_a_server_that_does_not_answer(prefect_url: str) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        orphaned_runs.give_back("ours")
