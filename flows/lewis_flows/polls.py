"""What the polls found: the last one is remembered in the store, and runs that have nothing to tell are deleted.

A poll every minute would hide the merges in Prefect's list of runs. What a poll announced is in the events, and in the
merge that it started. So its run stays only if it could not check what the poll before could, until that is mended; or
if somebody started it by hand.
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import State
from pydantic import BaseModel, ValidationError

from lewis import store
from lewis_flows import prefect_runs

logger = logging.getLogger(__name__)

RETRY_AFTER = timedelta(hours=1)
"""After a failed run, its release is announced again."""

QUIET, ANNOUNCED, PROBLEMS = "Quiet", "Announced", "Problems"
"""Names of the states of a poll: it found nothing new; it announced releases; it has problems that are new."""


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


def forget(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of the flow, for runs that a schedule started: delete this run and earlier ones, if they tell nothing."""
    if not flow_run.auto_scheduled:
        return
    known, ours = last(), state.name in (QUIET, ANNOUNCED)
    # Cancelled: it was due while another was going on. Crashed: the next poll, this one, did its work.
    over = ("CANCELLED", "CRASHED") if ours and known and known.problems else prefect_runs.ENDED
    try:
        with get_client(sync_client=True) as client:
            if ours:
                client.delete_flow_run(flow_run.id)
            _delete(client, {"type": {"any_": list(over)}}, but=flow_run)
    except httpx.HTTPError as error:  # the server is busy; a later poll deletes it
        logger.info("runs of polls are deleted later: %s", type(error).__name__)


def drop_missed() -> None:
    """Delete the polls that were due while no worker was there: the next poll finds everything they would have."""
    with get_client(sync_client=True) as client:
        _delete(client, {"name": {"any_": ["Late"]}})


def _delete(client: SyncPrefectClient, state: dict[str, Any], *, but: FlowRun | None = None) -> None:
    """Delete the polls that a schedule started and that are in some state, `but` one."""
    for run in prefect_runs.of_flows(client, (prefect_runs.WATCH,), state):
        if run.auto_scheduled and not (but and run.id == but.id):
            try:
                client.delete_flow_run(run.id)
            except ObjectNotFound:  # another process was quicker
                continue


def _path() -> Any:
    return store.home() / "last-poll.json"
