"""The deployments of the recipes: `merge/<recipe>` for each file; `search/` and `serve/<recipe>` if it asks for them.

A deployment is what an operator sees and controls: its page has the recipe's runs, a pause switch, the nightly
schedule, and *Quick Run*. After a file was added, edited, renamed, broken or removed, the deployments are made to match
the folder. What an operator changed is kept: a pause, the schedule, the work queue, the automation of releases.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, DeploymentSchedule, FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled
from tzlocal import get_localzone_name

from lewis import settings
from lewis.evaluation import work_queue
from lewis.evaluation.work_queue import MERGES as POOL
from lewis.recipe.recipe import Recipe
from lewis.registry import versions
from lewis.reports.markdown import plain
from lewis.serving import hub
from lewis_flows import approval, earlier_runs, prefect_runs
from lewis_flows.service import recipe_triggers
from lewis_flows.service.recipe_files import RecipeFile
from lewis_tasks.support import events
from lewis_tasks.support.flow_run import EDITED, pages

logger = logging.getLogger(__name__)
TAG = "lewis"  # of the recipes' deployments and of runs; those of the service have `automations.SERVICE_TAG`
_CANNOT_RUN = "cannot-run"  # tag of a deployment that is paused because its recipe cannot run
_OF_OURS = DeploymentFilter.model_validate({"tags": {"all_": [TAG]}})
_QUEUE = "queue:"  # prefix of the tag that names the work queue that was chosen here; without it, the default one was
_OURS = (TAG, _CANNOT_RUN, "recipe:", "team:", _QUEUE)  # tags, or prefixes of tags, that are set here
_HOLDING = ["PENDING", "RUNNING", "CANCELLING"]  # state types of a run that holds a slot of its deployment's limit
GPUS = "cuda"
"""The work queue of recipes that need several GPUs at once, if the pool has a queue of that name."""

_SOON = timedelta(minutes=2)  # a worker fetches a run seconds before its time
_REGISTERS = re.compile(  # the last paragraph of a description
    r"Registers \[(?P<model>[^]]+)\]\(\S+\)(?:; its champion is \[version (?P<champion>\d+)\]\(\S+\))?\.\Z"
)
_GRACE = 90  # seconds from Pending to Running; for so long a run holds the slot if its worker dies between them
_ENTRYPOINTS = {
    prefect_runs.MERGE: "lewis_flows.merge.merge_flow",
    prefect_runs.SEARCH: "lewis_flows.search.search_flow",
    prefect_runs.SERVE: "lewis_flows.serve.serve_flow",
}


def _parameter(kind: str, name: str, about: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "title": name, "description": about, **more}


_OVERRIDES = _parameter(
    "array", "overrides", "key.path=value each, as `lewis run --set`", items={"type": "string"}, position=1
)
_PARAMETERS = {
    prefect_runs.MERGE: {"overrides": _OVERRIDES},
    prefect_runs.SEARCH: {
        "overrides": _OVERRIDES,
        "trials": _parameter("integer", "trials", "how many in all, instead of the recipe's number", minimum=1),
        "minutes": _parameter("number", "minutes", "begin no further trial after this time", exclusiveMinimum=0),
    },
    prefect_runs.SERVE: {
        "again": _parameter("boolean", "again", "also where the champion is in service", default=False)
    },
}
"""Name of a flow -> the parameters of its form in Prefect, in addition to the recipe."""


def time_zone() -> str:
    """The name of this machine's time zone, in which nightly merges are scheduled."""
    return get_localzone_name() or "UTC"


def put(client: SyncPrefectClient, file: RecipeFile) -> Iterator[str]:
    """Create or update the deployments of a recipe.

    If the file was edited since it was deployed, a run is started: an edit is a release of the recipe.

    Yields:
        Sentences: what an operator changed and is kept, and what an edit leads to.
    """
    for flow in (prefect_runs.MERGE, *(flow for flow, block in _further(file).items() if block)):
        before = prefect_runs.deployment(client, f"{flow}/{file.name}")
        # A champion is served even if the models or files that a merge needs are missing.
        fields = _fields(flow, replace(file, why="") if flow == prefect_runs.SERVE else file, before)
        if flow != prefect_runs.SERVE:
            placed, tag = _place(client, file.recipe, before)
            fields |= {**placed, "tags": [*fields["tags"], *tag]}
        if before is None:
            made = client.create_deployment(client.create_flow_from_name(flow), file.name, **fields, **_first(flow))
        else:
            made = before.id
            client.update_deployment(made, DeploymentUpdate(**fields))
        if flow == prefect_runs.SERVE:
            _follow_champion(client, file, made, before)
        if flow != prefect_runs.MERGE:
            continue
        trigger = recipe_triggers.on_release(file.name, made)
        # Also if an earlier process died before this line.
        if recipe_triggers.is_missing(client, trigger.name, is_new=before is None):
            client.create_automation(trigger)
        if before is None:
            continue
        paused = before.paused and _CANNOT_RUN not in before.tags
        stays = f"{file.name} stays paused, as somebody paused it"
        lost = f"{file.name} has no longer the default parameters that somebody gave it; write them into its file"
        yield from _changed(before, stays, f"{file.name} keeps its own schedule", lost)
        if before.global_concurrency_limit and before.global_concurrency_limit.limit != 1:
            yield f"{file.name} has the concurrency limit 1 again: its runs take turns, whatever the limit"
        if before.version == file.version:
            continue
        if file.why or paused:
            yield f"{file.name} was edited and is not merged: {file.why or 'its deployment is paused'}"
        else:
            yield f"{file.name} was edited: it is merged now"
            earlier_runs.start_of_edit(client, before.id)


def _further(file: RecipeFile) -> dict[str, object]:
    """Return flow -> the block of a recipe that asks for a deployment of that flow; empty if the file is wrong."""
    recipe = file.recipe
    return {prefect_runs.SEARCH: recipe.search, prefect_runs.SERVE: hub.targets(recipe)} if recipe else {}


def _follow_champion(client: SyncPrefectClient, file: RecipeFile, made: Any, before: DeploymentResponse | None) -> None:
    """Have `serve/<recipe>` started whenever the champion moves, and start it now if the recipe is new or edited."""
    assert file.recipe is not None and file.recipe.register_as is not None
    trigger = recipe_triggers.on_promotion(file.name, file.recipe.register_as.model, made)
    if recipe_triggers.is_missing(client, trigger.name, is_new=before is None):
        client.delete_resource_owned_automations(f"prefect.deployment.{made}")  # of an earlier model
        client.create_automation(trigger)
    new = before is None or (before.version != file.version and not before.paused)
    if new:
        prefect_runs.start(client, made, tags=[EDITED])


def paused(client: SyncPrefectClient) -> set[str]:
    """Return the names of the recipes whose merges an operator paused."""
    merges = FlowFilter.model_validate({"name": {"any_": [prefect_runs.MERGE]}})
    found = pages(client.read_deployments, flow_filter=merges, deployment_filter=_OF_OURS)
    return {each.name for each in found if each.paused and _CANNOT_RUN not in each.tags}


def name_champions(client: SyncPrefectClient, champions: Mapping[str, tuple[str, str]]) -> None:
    """Update the links to champions in the descriptions of the recipes' deployments, where they are out of date.

    When the server updates a deployment, it plans the runs of its schedule again, within seconds. So a deployment with
    such a run that is due soon is left out: a later call, such as the one at the end of that run, updates it.

    Args:
        client: of the server.
        champions: recipe -> the model that it registers, and the number of its champion; empty if there is none.
    """
    for deployment in list(pages(client.read_deployments, deployment_filter=_OF_OURS)):
        model, champion = champions.get(deployment.name, ("", ""))
        named = _REGISTERS.search(deployment.description or "")
        if not named or named["model"] != model or (named["champion"] or "") == champion:
            continue
        if not any(run.auto_scheduled for run in _due_soon(client, deployment)):
            text = named.string[: named.start()] + _registers(model, champion)
            with suppress(ObjectNotFound):  # it was removed just now
                client.update_deployment(deployment.id, DeploymentUpdate(description=text))


def remove_stale(client: SyncPrefectClient, files: Collection[RecipeFile]) -> bool:
    """Remove the deployments that none of `files`, all recipes of the folder, asks for.

    A deployment with a run that goes on is kept: removed with it would be the limit of which the run holds a slot, and
    a server that cannot free the slot answers with an error to each state that would end the run.

    Returns:
        Whether a deployment is kept for that reason, to be removed by a later call.
    """
    stays, names = False, {each.name for each in files}
    dropped = {f"{flow}/{each.name}" for each in files for flow, block in _further(each).items() if not block}
    read_flow = cache(client.read_flow)
    for deployment in list(pages(client.read_deployments, deployment_filter=_OF_OURS)):
        name = f"{read_flow(deployment.flow_id).name}/{deployment.name}"
        of_recipe = f"recipe:{deployment.name}" in deployment.tags
        if name in dropped or (of_recipe and deployment.name not in names):
            if removed := remove(client, name):
                changed = _changed(
                    deployment, "it was paused", "it had a schedule of its own", "it had default parameters"
                )
                lost = ", and ".join(changed) if name.startswith(f"{prefect_runs.MERGE}/") else ""
                logger.info("the deployment %s is removed: no recipe asks for it%s", name, lost and f"; {lost}")
            stays = stays or not removed
    return stays


def remove(client: SyncPrefectClient, name: str) -> bool:
    """Remove the deployment `flow/name`, if it exists, and its automations; return False if a run of it goes on."""
    if found := prefect_runs.deployment(client, name):
        if _runs(client, found, _HOLDING):
            return False
        # The server deletes the deployment's scheduled runs with it. It would also delete a run that a worker begins
        # right now, and then log an error for each event of that run; a cancelled run is kept, and does not begin.
        for run in _due_soon(client, found):
            with suppress(ObjectNotFound):
                client.set_flow_run_state(run.id, Cancelled(message="no recipe asks for its deployment any more"))
        if _runs(client, found, _HOLDING):
            return False
        client.delete_resource_owned_automations(f"prefect.deployment.{found.id}")
        approval.lapse(client, found.id, "no recipe asks for its deployment any more; `lewis approve` takes an answer")
        with suppress(ObjectNotFound):  # another process was quicker
            client.delete_deployment(found.id)
    return True


def _due_soon(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    return _runs(client, deployment, ["SCHEDULED"], expected_start_time={"before_": events.now(client) + _SOON})


def _runs(
    client: SyncPrefectClient, deployment: DeploymentResponse, states: Sequence[str], **limits: Any
) -> list[FlowRun]:
    of_deployment = {"any_": [deployment.id]}
    return prefect_runs.of_flows(client, prefect_runs.ALL, states, deployment_id=of_deployment, **limits)


def _fields(flow: str, file: RecipeFile, before: DeploymentResponse | None) -> dict[str, Any]:
    """Return the fields of a deployment that each deploy sets; `before` is the deployment on the server, if any."""
    recipe = file.recipe
    team = recipe.register_as.team if recipe and recipe.register_as else None
    tags = [TAG, f"recipe:{file.name}", *([f"team:{team}"] if team else [])]
    tags += [tag for tag in (before.tags if before else []) if not tag.startswith(_OURS)]
    paused: dict[str, bool] = {}
    by_us = before is not None and _CANNOT_RUN in before.tags
    if file.why:
        if before is None or not before.paused or by_us:
            tags, paused = [*tags, _CANNOT_RUN], {"paused": True}
    elif by_us:
        paused = {"paused": False}
    recipes = {"type": "string", "title": "recipe", "enum": [file.name], "default": file.name, "position": 0}
    return {
        # A recipe that cannot run keeps its version: once it can, it counts as edited only if its text has changed.
        "version": before.version if before and file.why else file.version,
        "description": _description(file, before),
        "tags": tags,
        "parameters": {"recipe": file.name},
        # The process of a run with another parameter would end before it could say why.
        "parameter_openapi_schema": {
            "type": "object",
            "title": "Parameters",
            "properties": {"recipe": recipes, **_PARAMETERS[flow]},
            "additionalProperties": False,
        },
        "enforce_parameter_schema": True,
        "entrypoint": _ENTRYPOINTS[flow],
        "pull_steps": [],
        **({} if before else {"work_pool_name": POOL}),  # later, the pool and the queue are the operator's
        "concurrency_limit": 1,
        "concurrency_options": ConcurrencyOptions(
            collision_strategy=ConcurrencyLimitStrategy.ENQUEUE, grace_period_seconds=_GRACE
        ),
        **paused,
    }


def _place(
    client: SyncPrefectClient, recipe: Recipe | None, before: DeploymentResponse | None
) -> tuple[dict[str, str], list[str]]:
    """Choose the work queue of a deployment: `GPUS` if its runs need several GPUs and the pool has that queue.

    Returns:
        The fields that change, none if an operator chose the queue or the recipe is wrong; and the tags that name the
        queue that was chosen here, one or none.
    """
    tag = [each for each in before.tags if each.startswith(_QUEUE)] if before else []
    ours = tag[0].removeprefix(_QUEUE) if tag else "default"
    if recipe is None or (before and (before.work_pool_name, before.work_queue_name) != (POOL, ours)):
        return {}, tag
    needs = recipe.evaluate is not None and recipe.evaluate.gpus > 1 and not work_queue.queue()
    there = needs and any(each.name == GPUS for each in client.read_work_queues(work_pool_name=POOL))
    queue = GPUS if there else "default"
    changed = {"work_pool_name": POOL, "work_queue_name": queue} if queue != ours else {}
    return changed, [f"{_QUEUE}{GPUS}"] if there else []


def _first(flow: str) -> dict[str, Any]:
    """Return the settings that only a new deployment gets, its schedule; afterwards the operator may change them."""
    cron = settings.NIGHTLY.get() if flow == prefect_runs.MERGE else ""
    nightly = CronSchedule(cron=cron, timezone=time_zone()) if cron else None
    return {"schedules": [DeploymentScheduleCreate(schedule=nightly, active=True, slug="nightly")]} if nightly else {}


def _changed(deployment: DeploymentResponse, paused: str, schedule: str, parameters: str) -> Iterator[str]:
    """Yield an operator's changes: the text `paused` for a pause; for others a text, and what they are."""
    if deployment.paused and _CANNOT_RUN not in deployment.tags:
        yield paused
    nightly = settings.NIGHTLY.get()
    shown = [_hours(each) for each in deployment.schedules if each.active]
    if shown != ([nightly] if nightly else []):
        yield f"{schedule}: {', '.join(shown) or 'none'}"
    if own := {name: value for name, value in deployment.parameters.items() if value and name != "recipe"}:
        yield f"{parameters}: {own}"


def _hours(planned: DeploymentSchedule) -> str:
    """The hours of a schedule: its cron, with its time zone if that is not this machine's, and its own parameters."""
    found, zone = planned.schedule, getattr(planned.schedule, "timezone", None)
    more = [zone] if zone and zone != time_zone() else []
    more += [f"with {planned.parameters}"] if planned.parameters else []
    return " ".join([getattr(found, "cron", str(found)), *more])


def _description(file: RecipeFile, before: DeploymentResponse | None) -> str:
    """Return, in Markdown, the recipe's first comment, why it cannot run, and links to its model and champion.

    The champion is the one that the description of `before` names, if its model is the same; see `name_champions`.
    """
    links = ""
    if block := file.recipe.register_as if file.recipe else None:
        named = _REGISTERS.search((before.description if before else None) or "")
        known = named["champion"] if named and named["model"] == block.model else None
        links = _registers(block.model, known or "")
    why = f"**It cannot run:** {plain(file.why)}" if file.why else ""
    return "\n\n".join(filter(None, (file.comment, why, links)))


def _registers(model: str, champion: str) -> str:
    """Links to a registered model and to the version that is its champion, as `_REGISTERS` finds them."""
    version = f"; its champion is [version {champion}]({versions.page(model, champion)})" if champion else ""
    return f"Registers [{model}]({versions.model_page(model)}){version}."
