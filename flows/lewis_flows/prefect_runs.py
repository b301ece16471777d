"""Questions about flow runs that more than one module asks Prefect's server."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Scheduled, State

from lewis.errors import LewisError
from lewis_flows import recipes_folder
from lewis_flows.release_event import SETTLE
from lewis_tasks.support import events
from lewis_tasks.support import flow_run as run_tags

# Names of LEWIS's flows, as their decorators give them to Prefect.
MERGE, SEARCH, EVALUATE, SERVE, VERIFY, RETENTION = "merge", "search", "evaluate", "serve", "verify", "retention"
ALL = (MERGE, SEARCH, EVALUATE, SERVE, VERIFY, RETENTION)
OF_RECIPES = (MERGE, SEARCH, EVALUATE, SERVE)  # those whose runs are of one recipe
UNFINISHED = ("PENDING", "RUNNING", "PAUSED", "CANCELLING")  # state types of a run that is about to begin, or goes on
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")  # state types of a run that has ended
NEWEST = FlowRunSort.END_TIME_DESC  # the last to end first
SKIPPED = "Skipped"  # the state of a run that ended before it began, since another one merges what it would
_REPLACED_BY = "lewis.replaced-by"  # label of such a run: the id of the other one
_AHEAD = SETTLE + timedelta(seconds=5)  # how far ahead a run that waits may begin; it may be made after `now` was asked


def of_flows(
    client: SyncPrefectClient,
    flows: Sequence[str],
    states: Sequence[str],
    sort: FlowRunSort | None = None,
    **limits: Any,
) -> list[FlowRun]:
    """Return the runs of some flows in some states, at most 200, the server's limit.

    Args:
        flows, states: names of the flows, types of the states; no states: all.
        sort: which come first; by default the server's order.
        limits: further filters of `FlowRunFilter`, such as `end_time={"after_": ...}`; `state` is one of the states.

    Raises:
        httpx.HTTPError: if the server does not answer, or refuses.
    """
    return client.read_flow_runs(**_filters(flows, states, **limits), sort=sort, limit=run_tags.PAGE)


def all_of_flows(
    client: SyncPrefectClient, flows: Sequence[str], states: Sequence[str], sort: FlowRunSort = NEWEST, **limits: Any
) -> Iterator[FlowRun]:
    """Yield all runs of some flows in some states, as `of_flows`, page after page; by default the last to end first."""
    return run_tags.pages(client.read_flow_runs, **_filters(flows, states, **limits), sort=sort)


def _filters(
    flows: Sequence[str], states: Sequence[str], state: dict[str, Any] | None = None, **limits: Any
) -> dict[str, Any]:
    wanted = {**({"type": {"any_": list(states)}} if states else {}), **(state or {})}
    return {
        "flow_filter": FlowFilter(name=FlowFilterName(any_=list(flows))),
        "flow_run_filter": FlowRunFilter.model_validate({"state": wanted, **limits}),
    }


def flow_names(client: SyncPrefectClient) -> dict[UUID, str]:
    """Return id -> name of each flow of LEWIS that the server knows."""
    ours = FlowFilter(name=FlowFilterName(any_=list(ALL)))
    return {each.id: each.name for each in client.read_flows(flow_filter=ours)}


def recipe_of(run: FlowRun) -> str:
    """The name of the recipe that a run is for."""
    given = run.parameters.get("recipe") or ""
    with suppress(LewisError):  # there is no folder of recipes: the name stays as it was given
        return recipes_folder.name_of(str(given))
    return str(given)


def waits(run: FlowRun, now: datetime) -> bool:
    """Whether a scheduled run waits at `now`, the server's time; one that is planned for later does not.

    A schedule plans runs, and so does a person. The run of a release or an edit waits from the start, until `SETTLE` is
    over.
    """
    ahead = timedelta() if run.auto_scheduled else _AHEAD
    return run.state_name != "Scheduled" or (run.expected_start_time or now) <= now + ahead


def deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """The deployment `flow/name`; None if there is none."""
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def start(
    client: SyncPrefectClient, deployment: UUID, after: timedelta = timedelta(), tags: Sequence[str] = ()
) -> None:
    """Start a run of a deployment some time from now, by the server's clock."""
    when: State[Any] = Scheduled(scheduled_time=events.now(client) + after)
    client.create_flow_run_from_deployment(deployment, state=when, tags=tags)


def is_paused(client: SyncPrefectClient, recipe: str) -> bool:
    """Whether the deployment of a recipe is paused: then no release may start a merge of it.

    The server itself would start one: for it, a pause stops only the schedules.
    """
    found = deployment(client, f"{MERGE}/{recipe}")
    return found is not None and found.paused


def skip(client: SyncPrefectClient, run: FlowRun, other: FlowRun, why: str) -> None:
    """End a run that has not begun as `Skipped`, since the run `other` merges the same."""
    try:
        client.update_flow_run_labels(run.id, {_REPLACED_BY: str(other.id)})
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
        return  # somebody deleted it
    end(client, run, Completed(name=SKIPPED, message=why), "skipped")


def end(client: SyncPrefectClient, run: FlowRun, state: State[Any], verdict: str) -> None:
    """End a run in a state, whatever state it has, and tag it with the verdict; do nothing if somebody deleted it."""
    with suppress(ObjectNotFound):
        client.set_flow_run_state(run.id, state, force=True)
        run_tags.tag(run.id, verdict=verdict)


def replaced_by(run: FlowRun) -> UUID | None:
    """The id of the run that merges what a skipped run would have; None for a run that was not skipped."""
    other = run.labels.get(_REPLACED_BY)
    return UUID(str(other)) if other else None
