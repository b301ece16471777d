"""Cancel runs through Prefect: the worker ends a run's process, and what was finished is kept."""

import time
from collections.abc import Iterator

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import State
from pydantic import BaseModel

from lewis.errors import InputError, nearest
from lewis_flows import prefect_runs, recipes_folder
from lewis_flows.service.links import server
from lewis_tasks.support import events

PATIENCE = 90.0  # seconds for all runs to end; a process has 30 after SIGTERM
_FLOWS = (prefect_runs.MERGE, prefect_runs.SEARCH, prefect_runs.SERVE)


class Cancelled(BaseModel):
    """A run that was cancelled: its id, its name, its state after that, and whether it has ended."""

    id: str
    name: str
    state: str
    ended: bool


def cancel(what: str) -> list[Cancelled]:
    """Cancel runs and wait until they have ended.

    Args:
        what: the name of a recipe, all of whose runs that go on or are due are cancelled; or the name or id of a run.

    Raises:
        InputError: if there is no such recipe or run, or a run is one of `lewis run`, which no worker can end.
        TransientError: if the Prefect server does not answer.
    """
    with server() as (client, _):
        runs = list(_find(client, what))
        for run in runs:
            if run.deployment_id is None and run.state_type in (StateType.RUNNING, StateType.PENDING):
                raise InputError(f"{run.name}: it runs in a `lewis run` of its own; end that with Ctrl-C")
        for run in runs:
            client.set_flow_run_state(run.id, State(type=StateType.CANCELLING, message="by `lewis cancel`"))
        deadline = time.monotonic() + PATIENCE
        while True:
            now = [client.read_flow_run(run.id) for run in runs]
            ended = [run.state is not None and run.state.is_final() for run in now]
            if all(ended) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
    pairs = zip(now, ended, strict=True)
    return [Cancelled(id=str(run.id), name=run.name, state=run.state_name or "", ended=end) for run, end in pairs]


def _find(client: SyncPrefectClient, what: str) -> Iterator[FlowRun]:
    """Yield the runs to cancel, except those that another run has started, as they end with that one."""
    states, due = ("SCHEDULED", *prefect_runs.UNFINISHED), {"before_": events.now(client)}
    runs = [
        run
        for run in prefect_runs.all_of_flows(client, _FLOWS, states, FlowRunSort.ID_DESC, expected_start_time=due)
        if run.parent_task_run_id is None
    ]
    named = [run for run in runs if what in (run.name, str(run.id))]
    if named:
        yield from named
        return
    recipes = recipes_folder.names()
    if what not in recipes and what not in map(prefect_runs.recipe_of, runs):
        raise InputError(
            f"{what}: expected a recipe of {recipes_folder.folder()}, or the name or id of a run that goes on or is due"
            f"{nearest(what, recipes)}; `lewis status` shows what runs"
        )
    yield from (run for run in runs if prefect_runs.recipe_of(run) == what)
