"""What Prefect's server says for `lewis status`: workers, and the runs that go on, come next and ended last."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter
from prefect.client.schemas.objects import FlowRun, WorkQueueStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from lewis.evaluation import work_queue
from lewis_flows import prefect_runs, turn
from lewis_flows.prefect_runs import EVALUATE, MERGE, SEARCH, WATCH, recipe_of
from lewis_flows.service.credentials import connected
from lewis_flows.service.deploy import POOL
from lewis_flows.service.status_data import Part, Run, Status

PATIENCE = 10.0  # seconds for one request


def ask_prefect(found: Status, api: str) -> None:
    """Add the work pools and the runs to a status.

    Args:
        found: the status so far.
        api: URL of Prefect's API.

    Raises:
        httpx.HTTPError: if the server does not answer, or answers with an error.
        InputError: if it wants another key.
    """
    with (
        connected(api),
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": PATIENCE}) as client,
    ):
        for pool in _pools(client):
            found.parts += [_workers(client, pool), *_queues(client, pool)]
        found.running, found.scheduled, found.finished = _running(client), _scheduled(client), _finished(client)


def _pools(client: SyncPrefectClient) -> list[str]:
    """The work pool, and that of evaluations if it is another."""
    try:
        scoring = client.read_deployment_by_name(f"{EVALUATE}/{EVALUATE}").work_pool_name
    except ObjectNotFound:
        scoring = None
    return list(dict.fromkeys([POOL, scoring or POOL]))


def _workers(client: SyncPrefectClient, pool: str) -> Part:
    name = f"work pool {pool}"
    try:
        paused = client.read_work_pool(pool).is_paused
    except ObjectNotFound:
        return Part(name=name, up=False, state="does not exist; `lewis up` or `lewis deploy` makes it")
    online = [worker for worker in client.read_workers_for_work_pool(pool) if worker.status == "ONLINE"]
    if paused:
        return Part(name=name, up=False, state=f"is paused; run `prefect work-pool resume {pool}`")
    if not online:
        return Part(name=name, up=False, state=f"has no worker; start one: `prefect worker start --pool {pool}`")
    return Part(name=name, up=True, state=f"{len(online)} worker{'s' if len(online) > 1 else ''}")


def _queues(client: SyncPrefectClient, pool: str) -> Iterator[Part]:
    """The work queues of the pool beside the one that there always is; with them that one too."""
    try:
        queues = client.read_work_queues(work_pool_name=pool)
    except ObjectNotFound:
        return
    for queue in queues if len(queues) > 1 else []:
        paused, ready = queue.is_paused, queue.status == WorkQueueStatus.READY
        start = f"`python -m lewis_flows.service.worker {work_queue.worker_options(queue.name, pool)}`"
        state = f"has no worker; start one: {start}"
        if ready:
            state = "has a worker"
        if paused:
            state = f"is paused; run `prefect work-queue resume {queue.name} --pool {pool}`"
        yield Part(name=f"work queue {queue.name}", up=ready and not paused, state=state)


def _running(client: SyncPrefectClient) -> list[Run]:
    runs = _runs(client, (MERGE, SEARCH, EVALUATE, WATCH), prefect_runs.UNFINISHED, FlowRunSort.START_TIME_ASC)
    return _described(client, runs, lambda run: run.start_time or run.expected_start_time)


def _scheduled(client: SyncPrefectClient) -> list[Run]:
    """The next run of each deployment and recipe, the soonest first."""
    # Ask for each flow by itself: the server gives 200 runs at most, and a poll every minute would leave no room for
    # the nightly merges.
    soonest = FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC
    runs = [run for flow in (MERGE, SEARCH, EVALUATE, WATCH) for run in _runs(client, (flow,), ("SCHEDULED",), soonest)]
    first = _first(runs, lambda run: (run.deployment_id, recipe_of(run)))
    described = _described(client, first, lambda run: run.next_scheduled_start_time or run.expected_start_time)
    return sorted(described, key=lambda run: run.since or datetime.max.replace(tzinfo=UTC))


def _finished(client: SyncPrefectClient) -> list[Run]:
    """The last merge and the last search of each recipe, the newest first."""
    runs = _runs(client, (MERGE, SEARCH), prefect_runs.ENDED, FlowRunSort.END_TIME_DESC)
    return _described(client, _first(runs, lambda run: (run.flow_id, recipe_of(run))), lambda run: run.end_time)


def _runs(
    client: SyncPrefectClient, flows: tuple[str, ...], states: tuple[str, ...], sort: FlowRunSort
) -> list[FlowRun]:
    return prefect_runs.of_flows(client, flows, {"type": {"any_": states}}, sort)


def _described(
    client: SyncPrefectClient, runs: list[FlowRun], since: Callable[[FlowRun], datetime | None]
) -> list[Run]:
    ids = {run.deployment_id for run in runs if run.deployment_id}
    wanted = DeploymentFilter.model_validate({"id": {"any_": list(ids)}})
    names = {each.id: each.name for each in client.read_deployments(deployment_filter=wanted)} if ids else {}
    return [
        Run(
            recipe=recipe_of(run),
            name=run.name,
            deployment=names.get(run.deployment_id, "") if run.deployment_id else "",
            state=run.state_name or "",
            message=_waits(run) or (run.state.message if run.state else None) or "",
            since=since(run),
        )
        for run in runs
    ]


def _waits(run: FlowRun) -> str:
    going_on = run.state_type is not None and run.state_type.value in prefect_runs.UNFINISHED
    return "waits for its turn: another run of the recipe goes on" if going_on and turn.waits(str(run.id)) else ""


def _first(runs: Iterable[FlowRun], key: Callable[[FlowRun], Hashable]) -> list[FlowRun]:
    """Of the runs with the same key, the first."""
    kept: dict[Hashable, FlowRun] = {}
    for run in runs:
        kept.setdefault(key(run), run)
    return list(kept.values())
