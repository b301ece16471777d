"""What the service is doing: servers, runs, schedules, and what each champion holds."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter, FlowFilterName, FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from pydantic import BaseModel

from lewis import store
from lewis.errors import LewisError
from lewis.registry import releases
from lewis.registry.releases import Held
from lewis_flows import recipes_folder
from lewis_flows.service.status_text import as_text
from lewis_flows.watch import ENDED, recipe_name

FLOWS = ["merge", "watch-releases"]
POOL = "lewis"
_PATIENCE = 10.0  # seconds for one request


class Part(BaseModel):
    """A part of the service; `state` says how it is, or what to do."""

    name: str
    url: str = ""
    up: bool
    state: str


class Run(BaseModel):
    """A run of the merge or the watcher.

    Attributes:
        recipe: its name; empty for the watcher of all recipes.
        since: start, end or time planned, in UTC.
    """

    recipe: str
    name: str
    deployment: str = ""
    state: str
    message: str = ""
    since: datetime | None


class Input(BaseModel):
    """A model of a recipe: the commit key that the champion holds, and its head now; None if unknown or absent."""

    ref: str
    held: str | None
    head: str | None


class Watched(BaseModel):
    """A recipe; `unknown` says what could not be asked, and why."""

    recipe: str
    registered: str = ""
    champion: str | None = None
    inputs: list[Input] = []
    unknown: list[str] = []


class Status(BaseModel):
    """All of it. A section is None if it could not be asked; `unknown` says why."""

    parts: list[Part]
    running: list[Run] | None = None
    scheduled: list[Run] | None = None
    finished: list[Run] | None = None
    recipes: list[Watched] | None = None
    unknown: dict[str, str] = {}

    def to_text(self, width: int = 120) -> str:
        """Tables for a terminal of `width` characters; times are relative and in the local time zone."""
        return as_text(self, datetime.now(UTC), width)


def status() -> Status:
    """Ask every part; one that does not answer is told as such and is no error."""
    note = store.read_json(store.home() / "service.json") or {}
    api = os.environ.get("PREFECT_API_URL") or note.get("prefect") or ""
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or note.get("mlflow") or ""
    prefect, mlflow = _part("Prefect", api), _part("MLflow", tracking)
    if not tracking.startswith("http"):  # the registry is a file then: it needs no server
        mlflow = Part(
            name="MLflow", url=tracking or str(store.home() / "mlflow"), up=True, state="no server; the files"
        )
    found = Status(parts=[prefect, mlflow, _part("webhooks", note.get("webhook") or "")])
    if prefect.up:
        try:
            _ask_prefect(found, api)
        except httpx.HTTPError as error:
            found.unknown["runs"] = f"Prefect answers with an error: {error}"
    else:
        found.unknown["runs"] = f"Prefect {prefect.state}"
    try:
        names = recipes_folder.names()
    except LewisError as error:
        found.unknown["recipes"] = str(error)
        return found
    with ThreadPoolExecutor(8) as pool:
        found.recipes = list(pool.map(lambda name: _watched(name, mlflow), names))
    return found


def _part(name: str, url: str) -> Part:
    if not url:
        return Part(name=name, up=False, state="is not running; `lewis up` starts it")
    try:
        answer = httpx.get(f"{url.removesuffix('/webhook').rstrip('/')}/health", timeout=_PATIENCE)
        if answer.status_code == 200:
            return Part(name=name, url=url, up=True, state="answers")
        state = f"answers with an error ({answer.status_code}); look at its log"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        state = f"does not answer ({type(error).__name__})"
    return Part(name=name, url=url, up=False, state=state)


def _ask_prefect(found: Status, api: str) -> None:
    settings: dict[Any, Any] = {PREFECT_API_URL: api, PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(settings), get_client(sync_client=True, httpx_settings={"timeout": _PATIENCE}) as client:
        found.parts.append(_workers(client))
        found.running, found.scheduled, found.finished = _running(client), _scheduled(client), _finished(client)


def _workers(client: SyncPrefectClient) -> Part:
    name = f"work pool {POOL}"
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        return Part(name=name, up=False, state="does not exist; `lewis up` or `lewis deploy` makes it")
    online = [worker for worker in client.read_workers_for_work_pool(POOL) if worker.status == "ONLINE"]
    if pool.is_paused:
        return Part(name=name, up=False, state=f"is paused; run `prefect work-pool resume {POOL}`")
    if not online:
        return Part(name=name, up=False, state=f"has no worker; start one: `prefect worker start --pool {POOL}`")
    return Part(name=name, up=True, state=f"{len(online)} worker{'s' if len(online) > 1 else ''}")


def _running(client: SyncPrefectClient) -> list[Run]:
    runs = _runs(client, ("PENDING", "RUNNING", "PAUSED", "CANCELLING"), FlowRunSort.START_TIME_ASC, *FLOWS)
    return _described(client, runs, lambda run: run.start_time or run.expected_start_time)


def _scheduled(client: SyncPrefectClient) -> list[Run]:
    """The next run of each deployment and recipe, the soonest first."""
    # One question per flow: the server gives 200 runs at most, and a poll a minute would crowd the nightly merges out.
    asked = [_runs(client, ("SCHEDULED",), FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC, flow) for flow in FLOWS]
    first = _first([run for runs in asked for run in runs], lambda run: (run.deployment_id, _recipe_of(run)))
    described = _described(client, first, lambda run: run.next_scheduled_start_time or run.expected_start_time)
    return sorted(described, key=lambda run: run.since or datetime.max.replace(tzinfo=UTC))


def _finished(client: SyncPrefectClient) -> list[Run]:
    """The last merge of each recipe, the newest first."""
    runs = _runs(client, ENDED, FlowRunSort.END_TIME_DESC, "merge")
    return _described(client, _first(runs, _recipe_of), lambda run: run.end_time)


def _runs(client: SyncPrefectClient, states: tuple[str, ...], sort: FlowRunSort, *flows: str) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=list(flows))),
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": states}}}),
        sort=sort,
    )


def _described(
    client: SyncPrefectClient, runs: list[FlowRun], since: Callable[[FlowRun], datetime | None]
) -> list[Run]:
    ids = {run.deployment_id for run in runs if run.deployment_id}
    wanted = DeploymentFilter.model_validate({"id": {"any_": list(ids)}})
    names = {each.id: each.name for each in client.read_deployments(deployment_filter=wanted)} if ids else {}
    return [
        Run(
            recipe=_recipe_of(run),
            name=run.name,
            deployment=names.get(run.deployment_id, "") if run.deployment_id else "",
            state=run.state_name or "",
            message=(run.state.message if run.state else None) or "",
            since=since(run),
        )
        for run in runs
    ]


def _first(runs: Iterable[FlowRun], key: Callable[[FlowRun], Any]) -> list[FlowRun]:
    kept: dict[Any, FlowRun] = {}
    for run in runs:
        kept.setdefault(key(run), run)
    return list(kept.values())


def _recipe_of(run: FlowRun) -> str:
    given = run.parameters.get("recipe") or ", ".join(run.parameters.get("recipes") or [])
    with suppress(LewisError):  # no folder of recipes
        return recipe_name(str(given))
    return str(given)


def _watched(name: str, mlflow: Part) -> Watched:
    """One recipe: what its champion holds, and the heads now."""
    found = Watched(recipe=name)
    try:
        recipe = recipes_folder.load(name)
    except (LewisError, OSError) as error:
        found.unknown.append(str(error))
        return found
    heads: dict[str, str] = {}
    held: list[Held] = []
    try:
        heads = releases.heads(recipe)
    except (LewisError, OSError) as error:
        found.unknown.append(f"the heads now: {error}")
    try:
        if recipe.register_as:
            found.registered = recipe.register_as.name
            held = _held(found.registered, mlflow)
    except (LewisError, OSError) as error:
        found.unknown.append(f"the champion: {error}")
    champion = next((version for version in held if "champion" in version.aliases), None)
    found.champion = champion.version if champion else None
    refs = [recipe.base_model, *(entry.model for entry in recipe.experts)]
    for ref in dict.fromkeys(ref for ref in refs if ref):
        found.inputs.append(Input(ref=ref, held=champion.commit_of(ref) if champion else None, head=heads.get(ref)))
    return found


def _held(name: str, mlflow: Part) -> list[Held]:
    if not mlflow.up:  # its client would try for minutes
        raise LewisError(f"MLflow {mlflow.state}")
    return releases.merged(name)
