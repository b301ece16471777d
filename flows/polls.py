"""What the polls found: the last one is remembered in the store, and the run of one that found nothing new is deleted.

A poll every minute would hide the merges in Prefect's list of runs. So the run of a poll stays only if a person wants
to see it: it announced a release, it could not check what the poll before could, or somebody started it by hand.
"""

import logging
from datetime import UTC, datetime
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import State
from pydantic import BaseModel, ValidationError

from lewis import store
from lewis_flows import prefect_runs

logger = logging.getLogger(__name__)

QUIET = "Quiet"
"""Name of the state of a poll that found nothing new."""


class Poll(BaseModel):
    """The last poll.

    Attributes:
        time: when it ended, UTC.
        checked: how many recipes it compared with the registry.
        problems: recipe -> why it could not be checked; under an empty name, why none could.
    """

    time: datetime
    checked: int = 0
    problems: dict[str, str] = {}


def last() -> Poll | None:
    """The last poll of all recipes; None if there was none."""
    try:
        return Poll.model_validate(store.read_json(_path()))
    except ValidationError:
        return None


def remember(checked: int, problems: dict[str, str]) -> bool:
    """Note what a poll found; gives whether its problems are others than those of the poll before."""
    before = last()
    store.write_json(_path(), Poll(time=datetime.now(UTC), checked=checked, problems=problems).model_dump(mode="json"))
    return problems != (before.problems if before else {})


def forget_quiet(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of the flow: delete its run if a schedule started it and it has nothing to tell."""
    if not flow_run.auto_scheduled:
        return
    message = state.message or ""
    if state.name != QUIET and not (state.is_failed() and not remember(0, {"": message})):
        return
    with get_client(sync_client=True) as client:
        client.delete_flow_run(flow_run.id)
        _delete(client, "Cancelled")  # due while another was going on


def drop_missed() -> None:
    """Delete the polls that were due while no worker was there: the next poll finds everything they would have."""
    with get_client(sync_client=True) as client:
        _delete(client, "Late")


def _delete(client: SyncPrefectClient, state: str) -> None:
    for run in prefect_runs.of_flows(client, (prefect_runs.WATCH,), {"name": {"any_": [state]}}):
        if run.auto_scheduled:
            try:
                client.delete_flow_run(run.id)
            except ObjectNotFound:  # another process was quicker
                continue


def _path() -> Any:
    return store.home() / "last-poll.json"
