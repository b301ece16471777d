"""Find out what the service is doing: ask each of its servers, the registry, and the Hub for each recipe."""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter
from prefect.client.schemas.objects import FlowRun, WorkQueueStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound

from lewis import settings, store
from lewis.errors import LewisError
from lewis.evaluation import work_queue
from lewis.models.source import commits_of, pin_all
from lewis.recipe.recipe import Recipe
from lewis.redact import redacted
from lewis.registry import history, releases
from lewis.registry.releases import Held
from lewis.serving import hub as serving
from lewis.serving import records, slots
from lewis_flows import earlier_runs, evaluation_files, polls, prefect_runs, recipes_folder, turn, watch
from lewis_flows.prefect_runs import EVALUATE, MERGE, SEARCH, of_flows, recipe_of
from lewis_flows.service import note, recipe_deployments
from lewis_flows.service.credentials import connected
from lewis_flows.service.deploy import POOL
from lewis_flows.service.status_data import Input, Part, Run, Status, Watched
from lewis_tasks.support import device_queue, events
from lewis_tasks.support.flow_run import BROKEN, PAGE, tagged
from lewis_tasks.support.patience import impatient


def status(only: str = "", *, hub: bool = True, scores: bool = False) -> Status:
    """Ask every part of the service for its status; if a part does not answer, the status says so.

    Args:
        only: name or path of the one recipe to report on, with its last runs; by default all recipes of the folder,
            with the last run each.
        hub: whether to ask for the newest commits; else only what the last poll saw is known.
        scores: whether to ask for the scores of versions.
    """
    known = note.read()
    api = os.environ.get("PREFECT_API_URL") or known.get("prefect") or ""
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or known.get("mlflow") or ""
    prefect, mlflow = _part("Prefect", api), _part("MLflow", tracking)
    if not tracking.startswith("http"):  # the registry is a file then: it needs no server
        mlflow = Part(
            name="MLflow", url=redacted(tracking) or str(store.home() / "mlflow"), up=True, state="no server; the files"
        )
    webhooks = _part("webhooks", settings.WEBHOOK_URL.get() or known.get("webhook") or "")
    parts = [prefect, mlflow, webhooks]
    if url := known.get("champion"):
        up, state = slots.state()
        parts.append(Part(name="champion", url=f"{url}/v1", up=up, state=state))
    found = Status(parts=parts, polled=polls.last())
    found.devices = device_queue.queue()
    facts = _Facts()
    if prefect.up:
        try:
            facts = _ask_prefect(found, api, only)
        except LewisError as error:
            found.unknown["runs"] = str(error)
    else:
        found.unknown["runs"] = f"Prefect {prefect.state}"
    try:
        names = [only] if only else recipes_folder.names()
    except LewisError as error:
        found.unknown["recipes"] = str(error)
        return found
    since = polls.behind_since()
    with ThreadPoolExecutor(8) as pool:
        found.recipes = list(pool.map(lambda name: _watched(name, mlflow, facts, hub=hub, scores=scores), names))
    for recipe in found.recipes:
        _add_times(recipe, found, since.get(recipe.recipe), facts)
    return found


@dataclass
class _Facts:
    """What Prefect knows of recipes, in addition to the runs in a status.

    Attributes:
        merged: recipe -> digest of the text that was merged last.
        broken: recipe -> commits that are broken on the Hub itself, as for the poll.
        paused: recipes whose merges an operator paused.
        due: recipes of which a merge goes on or begins soon.
    """

    merged: dict[str, str] = field(default_factory=dict)
    broken: dict[str, set[str]] = field(default_factory=dict)
    paused: set[str] = field(default_factory=set)
    due: set[str] = field(default_factory=set)


def _add_times(recipe: Watched, found: Status, seen: datetime | None, facts: _Facts) -> None:
    """Add since when a recipe's champion is behind, by the polls, its pause, and when a failed merge is tried again.

    Commits that a version with a verdict holds are not merged again, unless the recipe was edited, or an author took a
    later release back.
    """
    recipe.behind_since = seen if recipe.settled is None or recipe.is_behind else None
    recipe.paused = recipe.recipe in facts.paused
    open_ = bool(seen) or not recipe.champion if recipe.settled is None else not recipe.settled
    last = next((run for run in found.last_runs() if run.flow == MERGE and run.recipe == recipe.recipe), None)
    if not ((recipe.registered and open_) or recipe.unmerged) or recipe.recipe in facts.due:
        return
    if last is None or last.since is None or last.state not in ("Failed", "TimedOut", "Crashed", "Cancelled"):
        return
    broken = facts.broken.get(recipe.recipe, set())
    refs = [each.ref for each in recipe.inputs if each.head and broken & set(commits_of(each.head))]
    if recipe.paused:
        recipe.after = "its deployment is resumed"
    elif recipe.broken:
        recipe.after = "it is corrected"
    elif refs:
        recipe.after = f"another commit of {' and '.join(refs)}, which is broken on the Hub"
    elif not broken or any(each.head for each in recipe.inputs):  # else it is unknown what is newest
        recipe.next_attempt = last.since + (polls.RETRY_AFTER if last.state in ("Failed", "TimedOut") else timedelta())


def _part(name: str, url: str) -> Part:
    if not url:
        return Part(name=name, up=False, state="is not running; `lewis up` starts it")
    shown = redacted(url)
    try:
        answer = httpx.get(f"{url.removesuffix('/webhook').rstrip('/')}/health", timeout=PATIENCE)
        if answer.status_code == 200:
            return Part(name=name, url=shown, up=True, state="answers")
        state = f"answers with an error ({answer.status_code}); look at its log"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        state = f"does not answer ({type(error).__name__})"
    return Part(name=name, url=shown, up=False, state=state)


def _watched(name: str, mlflow: Part, facts: _Facts, *, hub: bool, scores: bool) -> Watched:
    """Return the status of one recipe: what its champion holds, and the newest commits of its models."""
    found = Watched(recipe=name)
    try:
        recipe = recipes_folder.load(name)
        evaluation_files.check(recipe)
    except Exception as error:  # whatever is wrong with one recipe does not stop the others
        found.unknown.append(str(error))
        found.broken, found.registered = True, recipes_folder.registered_name(name)
        _ask_registry(found, mlflow, None, scores=scores)
        return found
    found.unmerged = name in facts.merged and earlier_runs.is_unmerged(recipe, facts.merged)
    heads: dict[str, str] = {}
    try:
        heads = releases.heads(*pin_all(recipe)) if hub else {}
    except (LewisError, OSError) as error:
        found.unknown.append(f"the heads now: {error}")
    found.registered = recipe.register_as.model if recipe.register_as else ""
    held = _ask_registry(found, mlflow, recipe, scores=scores)
    champion = releases.champion(held)
    refs = [recipe.base_model, *(entry.model for entry in recipe.experts)]
    for ref in dict.fromkeys(ref for ref in refs if ref):
        found.inputs.append(Input(ref=ref, held=champion.commit_of(ref) if champion else None, head=heads.get(ref)))
    if heads and found.registered and not found.unknown:
        judged = [version for version in held if version.verdict and not version.lapsed]
        holding = [each for each in judged if all(each.commit_of(ref) == head for ref, head in heads.items())]
        found.settled = bool(holding) and not releases.moved(heads, held, base=recipe.base_model, root=recipe.root)
    return found


def _ask_registry(found: Watched, mlflow: Part, recipe: Recipe | None, *, scores: bool) -> list[Held]:
    """Add what the registry knows of a recipe, or why it is unknown; return the versions of its model, newest first.

    `recipe` is None if its file is wrong; then all targets of the model count as its own.
    """
    try:
        if found.registered and not mlflow.up:  # MLflow's client would try again for minutes
            raise LewisError(f"MLflow {mlflow.state}")
        held = releases.merged(found.registered) if found.registered else []
        found.lost = history.lost_champion(found.registered) if found.registered and not releases.champion(held) else ""
        targets = records.served(found.registered) if held else []
        found.served = [each.line() for each in targets]
        failed = [each for each in targets if each.failure and (recipe is None or serving.has(recipe, each))]
        found.unserved = [each.line() for each in failed]
        found.scores = history.scores(found.registered) if scores and held else {}
    except (LewisError, OSError) as error:
        found.unknown.append(f"the champion: {error}")
        held = []
    champion, waits = releases.champion(held), releases.waiting(held)
    found.champion = champion.version if champion else None
    found.waiting = waits.version if waits else None
    return held


PATIENCE = 10.0  # seconds for one request
LAST = 5  # runs of one recipe that are shown


def _ask_prefect(found: Status, api: str, only: str) -> _Facts:
    """Add the work pools and runs of the Prefect server at `api`, `only` those of one recipe; raises as `connected`."""
    with connected(api), impatient(PATIENCE) as client:
        scoring = prefect_runs.deployment(client, f"{EVALUATE}/{EVALUATE}")
        own = scoring.work_pool_name if scoring else None
        for pool in dict.fromkeys([POOL, own or POOL]):  # evaluations may have one of their own
            found.parts += [_workers(client, pool), *_queues(client, pool)]
        found.running, found.scheduled = _running(client), _scheduled(client)
        names: list[str] = []
        with suppress(LewisError):  # there is no folder of recipes
            names = recipes_folder.names()
        found.finished = _finished(client, only, names)
        due = watch.due(client, events.now(client))
        merged, paused = earlier_runs.merged(client, names), recipe_deployments.paused(client)
        facts = _Facts(merged, _broken(client, names), paused, due)
    if only:
        found.running, found.scheduled = (
            [run for run in runs if run.recipe == only] for runs in (found.running, found.scheduled)
        )
    return facts


def _broken(client: SyncPrefectClient, names: Sequence[str]) -> dict[str, set[str]]:
    """Return recipe -> the commits that its runs found broken on the Hub itself, of those that still are."""
    commits: dict[str, set[str]] = {}
    for run in prefect_runs.all_of_flows(client, (MERGE,), ("FAILED",)):
        commits.setdefault(recipe_of(run), set()).update(tagged(run, BROKEN))
    for name in names:
        if found := commits.get(name):
            with suppress(LewisError):  # a recipe that cannot be read: its own line says why
                commits[name] = earlier_runs.still_broken(client, recipes_folder.load(name), found)
    return commits


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
    """Yield the work queues of a pool; none if it has only the one that every pool has."""
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
    flows, first = (MERGE, SEARCH, EVALUATE), FlowRunSort.START_TIME_ASC
    runs = of_flows(client, flows, prefect_runs.UNFINISHED, first)
    return _described(client, runs, lambda run: run.start_time or run.expected_start_time)


def _scheduled(client: SyncPrefectClient) -> list[Run]:
    """The next run of each deployment and recipe, the soonest first."""
    # Ask for each flow by itself: the server gives 200 runs at most.
    soonest = FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC
    runs = [run for flow in (MERGE, SEARCH, EVALUATE) for run in of_flows(client, (flow,), ("SCHEDULED",), soonest)]
    first = _first(runs, lambda run: (run.deployment_id, recipe_of(run)))
    described = _described(client, first, lambda run: run.next_scheduled_start_time or run.expected_start_time)
    return sorted(described, key=lambda run: run.since or datetime.max.replace(tzinfo=UTC))


def _finished(client: SyncPrefectClient, only: str, names: Sequence[str]) -> list[Run]:
    """Return the last merge and the last search of each recipe, or `LAST` runs of one; newest first, none skipped."""
    runs = _ended(client)
    if len(runs) == PAGE:  # there may be more
        rest = {only} if only else set(names) - set(map(recipe_of, runs))
        older = [run for name in rest for run in _ended(client, f"recipe:{name}")]
        found = {run.id: run for run in [*runs, *older]}.values()
        runs = sorted(found, key=lambda run: run.end_time or datetime.min.replace(tzinfo=UTC), reverse=True)
    if only:
        last = [run for run in runs if recipe_of(run) == only][:LAST]
    else:
        last = _first(runs, lambda run: (run.flow_id, recipe_of(run)))
    return _described(client, last, lambda run: run.end_time)


def _ended(client: SyncPrefectClient, *tags: str) -> list[FlowRun]:
    """Return the newest merges and searches that have ended and have all of some tags, at most `PAGE`."""
    begun, newest = {"name": {"not_any_": [prefect_runs.SKIPPED]}}, FlowRunSort.END_TIME_DESC
    limits = {"tags": {"all_": list(tags)}} if tags else {}
    return of_flows(client, (MERGE, SEARCH), prefect_runs.ENDED, newest, state=begun, **limits)


def _described(
    client: SyncPrefectClient, runs: list[FlowRun], since: Callable[[FlowRun], datetime | None]
) -> list[Run]:
    ids = {run.deployment_id for run in runs if run.deployment_id}
    wanted = DeploymentFilter.model_validate({"id": {"any_": list(ids)}})
    names = {each.id: each.name for each in client.read_deployments(deployment_filter=wanted)} if ids else {}
    flows = prefect_runs.flow_names(client) if runs else {}
    return [
        Run(
            recipe=recipe_of(run),
            name=run.name,
            flow=flows.get(run.flow_id, ""),
            deployment=names.get(run.deployment_id, "") if run.deployment_id else "",
            state=run.state_name or "",
            message=_waits(run) or (run.state.message if run.state else None) or "",
            since=since(run),
        )
        for run in runs
    ]


def _waits(run: FlowRun) -> str:
    going_on = run.state_type is not None and run.state_type.value in prefect_runs.UNFINISHED
    why = "waits for its turn: another run of the recipe, or of its group, goes on"
    return why if going_on and turn.waits(str(run.id)) else ""


def _first(runs: Iterable[FlowRun], key: Callable[[FlowRun], Hashable]) -> list[FlowRun]:
    """Return the first of the runs for each value of `key`."""
    kept: dict[Hashable, FlowRun] = {}
    for run in runs:
        kept.setdefault(key(run), run)
    return list(kept.values())
