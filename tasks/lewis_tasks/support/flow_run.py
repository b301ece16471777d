"""The flow run that a task belongs to: its name, what started it, where the UI shows it."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import TaskRunContext
from prefect.events.filters import EventFilter
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run as current
from prefect.states import Cancelled, Completed, State
from prefect.utilities.urls import url_for

from lewis import store
from lewis.recipe.recipe import Recipe
from lewis.redact import redacted
from lewis.reports.page import StepTime
from lewis.reports.run_report import changes, duration, run_name, short
from lewis.steps.graph import short_refs
from lewis_tasks.support.patience import impatient

T = TypeVar("T")
logger = logging.getLogger(__name__)
PAGE = 200  # how many runs, artifacts or others the server gives at most for one request
REJECTED, PATIENCE = "Rejected", 10.0  # seconds
RECIPE, MODEL = "lewis.recipe", "lewis.model."
"""Labels of a run: `RECIPE` is the digest of its recipe's text, `MODEL` + reference are the commits of a model."""
BROKEN = "broken"  # kind of tag of a run: a commit that the run found broken on the Hub itself
EDITED = "edited"  # tag of a run that an edit of its recipe started
ANSWERED = "answered"  # tag of a run that a person's approval started
_WHY = {
    "search": "by another flow",
    "edit": "because the recipe was edited",
    "approval": "because its version was approved",
    "hand": "by hand",
}
later = ""  # if the Prefect server ends with the run: the URL of the server that will show the run, that of `lewis up`


class RejectedRun(Exception):
    """The exception in the state of a rejected run, since Prefect requires one in every state of the type Cancelled.

    Attributes:
        report: what the run returns.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        """Keep the report. Prefect shows `message` as the message of the state."""
        super().__init__(message)
        self.report = report


def ending(name: str, message: str, data: Any) -> State[Any]:
    """Return the final state of a run that did all its work, and tag this run with the state's name as its verdict.

    The state's type is Completed, except of `Rejected`, which is Cancelled: Prefect's pages colour a run by the type of
    its state, so a rejection is grey in lists, bars and the dashboard. It is no failure, and no run repeats it.
    """
    tag(verdict=name.lower())
    if name == REJECTED:
        _wait_for_ends()
        return Cancelled(name=name, message=message, data=RejectedRun(message, data))
    return Completed(name=name, message=message, data=data)


def _wait_for_ends() -> None:
    """Wait until the server knows that this run's tasks have ended, since it cancels unfinished ones of Cancelled runs.

    It learns of tasks from events, which arrive a little late. Do not wait for a server that does not answer.
    """
    of_run = FlowRunFilter.model_validate({"id": {"any_": [str(current.id)]}})
    going_on = TaskRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
    deadline = time.monotonic() + PATIENCE
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        while client.read_task_runs(flow_run_filter=of_run, task_run_filter=going_on, limit=1):
            if time.monotonic() > deadline:
                return
            time.sleep(0.2)


def did_its_work(run: FlowRun) -> bool:
    """Whether a run ended with a state of `ending`: it did not fail or crash, and no person cancelled it."""
    return run.state is not None and (run.state.is_completed() or run.state.name == REJECTED)


def result_of_run(state: State[Any]) -> Any:
    """Return the result of a flow run from its final state, also of a rejected run.

    Raises:
        Exception: the error of a run that failed or was cancelled.
    """
    found = state.result(raise_on_failure=state.name != REJECTED)
    return found.report if isinstance(found, RejectedRun) else found


def note_text(recipe: Recipe) -> None:
    """Label the run with its recipe's digest, in case it fails before `rename`; an error is logged, not raised."""
    try:
        with impatient(5, retries=2) as client:  # a busy server answers 503
            client.update_flow_run_labels(UUID(str(current.id)), {RECIPE: store.digest(recipe.text)})
    except Exception as error:
        logger.warning("the run does not say which text of its recipe it has: Prefect did not take it (%s)", error)


def rename(recipe: Recipe, keys: Mapping[str, str]) -> None:
    """Name the run after what changed since the recipe's last run that did its work; label it with digest and commits.

    The name is only for people: a failure is logged, not raised.

    Args:
        keys: reference of each model -> its commits.
    """
    labels = {RECIPE: store.digest(recipe.text)} | {f"{MODEL}{ref}": key for ref, key in keys.items()}
    try:
        with impatient(20, retries=2) as client:  # a busy server answers 503
            before = _labels_before(client, recipe.name)
            of_before = {name.removeprefix(MODEL): key for name, key in before.items() if name.startswith(MODEL)}
            edited = before.get(RECIPE) != labels[RECIPE]
            name = run_name(recipe.name, changes(of_before, keys) if before else None, short_refs(recipe), edited)
            client.update_flow_run(UUID(str(current.id)), name=name)
            client.update_flow_run_labels(UUID(str(current.id)), dict(labels))
    except Exception as error:
        logger.warning("the run keeps its name: Prefect does not say or take what moved (%s)", error)


def _labels_before(client: SyncPrefectClient, recipe: str) -> dict[str, str]:
    """The labels of the last run of a recipe that did its work; empty if there is none."""
    wanted = {"tags": {"all_": [f"recipe:{recipe}"]}, "state": {"type": {"any_": ["COMPLETED", "CANCELLED"]}}}
    wanted["parent_task_run_id"] = {"is_null_": True}  # leave out trials of a search, whose recipes differ
    of_recipe = FlowRunFilter.model_validate(wanted)
    runs = client.read_flow_runs(flow_run_filter=of_recipe, sort=FlowRunSort.END_TIME_DESC, limit=20)
    labels = (run.labels for run in runs if RECIPE in run.labels and did_its_work(run))
    return {name: str(value) for name, value in next(labels, {}).items()}


def pages(read: Callable[..., Sequence[T]], **wanted: Any) -> Iterator[T]:
    """Yield everything that a method of Prefect's client returns for the filters `wanted`, page after page."""
    for offset in itertools.count(0, PAGE):
        page = read(**wanted, limit=PAGE, offset=offset)
        yield from page
        if len(page) < PAGE:
            return


def name_task(name: str) -> None:
    """Rename the running task after what it found out; the name is shown once the task has ended."""
    if context := TaskRunContext.get():
        context.task_run.name = name  # sent with the task's last state


def tag(run: UUID | None = None, /, **values: str) -> None:
    """Add tags such as `recipe:tiny` to a flow run, by which people filter; a failure is logged, not raised.

    Args:
        run: the flow run; by default, this one.
        values: kind -> value. A kind has one value: the new one takes the place of the old one.
    """
    try:
        of = run or UUID(str(current.id))
        with impatient(5, retries=2) as client:
            kept = [each for each in client.read_flow_run(of).tags if each.partition(":")[0] not in values]
            client.update_flow_run(of, tags=[*kept, *(f"{kind}:{value}" for kind, value in values.items())])
    except Exception as error:
        logger.warning("the run gets no tags: Prefect did not take %s (%s)", values, error)


def tagged(run: FlowRun, kind: str) -> set[str]:
    """The values of a kind among the tags of a run, as `tag` writes them."""
    return {each.partition(":")[2] for each in run.tags if each.startswith(f"{kind}:")}


def tag_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of flows: tag a run that failed, crashed or was cancelled with the name of that state as its verdict.

    A run that is being cancelled is tagged `cancelled` already, since Prefect calls no hook once it has ended.
    """
    tag(flow_run.id, verdict="cancelled" if state.is_cancelling() else (state.name or state.type.value).lower())


HOOKS: dict[str, Any] = {"on_failure": [tag_end], "on_crashed": [tag_end], "on_cancellation": [tag_end]}
"""Arguments of `@flow` that give a verdict to runs which do not reach their end; the others set theirs in `ending`."""


def trigger(run: FlowRun) -> str:
    """What started a run, in a word: `search`, `edit`, `approval`, `schedule`, `release` or `hand`; see `why`."""
    if run.parent_task_run_id:
        return "search"
    if EDITED in run.tags:
        return "edit"
    if ANSWERED in run.tags:
        return "approval"
    kind = run.created_by.type if run.created_by else None
    return {"SCHEDULE": "schedule", "AUTOMATION": "release"}.get(str(kind), "hand")


def tags() -> dict[str, str]:
    """Tags for MLflow that lead back to the flow run."""
    return {"lewis.prefect.flow_run_id": str(current.id), "lewis.prefect.url": url()}


def url() -> str:
    """Return the URL at which Prefect's UI shows this flow run, now or `later`."""
    if later:
        return f"{later}/runs/flow-run/{current.id}"
    return redacted(url_for("flow-run", obj_id=str(current.id)) or "")


def url_text() -> str:
    """Return the text for a link to `url`."""
    return "Prefect run, while `lewis up` runs" if later else "Prefect run"


def this_run() -> FlowRun:
    """Read this flow run from Prefect's server."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(str(current.id)))


def why(run: FlowRun) -> str:
    """What started a run: `by hand`, `by schedule (cron 0 3 * * *)`, `because of a release: org/math 1a2b → 3c4d`."""
    started, made = trigger(run), run.created_by
    if made is None or started in _WHY:
        return _WHY[started]
    # The server may have forgotten the schedule or event; then fall back to the name that is kept in the run.
    with suppress(Exception), get_client(sync_client=True) as client:
        return f"by schedule ({_schedule(client, run)})" if started == "schedule" else _event(client, run)
    return f"by {(made.type or '').lower()} {made.display_value}"


def tally(**steps: Iterable[PrefectFuture[Any] | None]) -> dict[str, tuple[int, int]]:
    """Count the finished tasks of each step: step -> (how many were computed, how many came from the cache)."""
    states = {step: [future.state.name for future in futures if future] for step, futures in steps.items()}
    return {step: (len(names) - names.count("Cached"), names.count("Cached")) for step, names in states.items()}


def step_times(run: FlowRun) -> list[StepTime]:
    """Return how long each ended task of a run took, ordered by begin; tasks that cannot be read are left out."""
    of_run = FlowRunFilter.model_validate({"id": {"any_": [str(run.id)]}})
    found, begun = list[StepTime](), run.start_time
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        for each in pages(client.read_task_runs, flow_run_filter=of_run):
            begin = (each.start_time - begun).total_seconds() if each.start_time and begun else 0.0
            seconds = each.total_run_time.total_seconds()
            found.append(StepTime(each.name, each.state_name or "", max(begin, 0.0), seconds))
    return sorted((each for each in found if each.state not in ("", "Pending", "Running")), key=lambda each: each.begin)


def _schedule(client: SyncPrefectClient, run: FlowRun) -> str:
    assert run.created_by is not None and run.deployment_id is not None
    schedules = client.read_deployment(run.deployment_id).schedules
    found = next(each.schedule for each in schedules if each.id == run.created_by.id)
    if isinstance(found, CronSchedule):
        return f"cron {found.cron}" + (f" {found.timezone}" if found.timezone else "")
    if isinstance(found, IntervalSchedule):
        return f"every {duration(found.interval.total_seconds())}"
    assert isinstance(found, RRuleSchedule)
    return f"rrule {found.rrule}"


def _event(client: SyncPrefectClient, run: FlowRun) -> str:
    """Say which event started a run: look up the action that created it, then the event that triggered the action."""
    assert run.created_by is not None
    started = {"event": {"name": ["prefect.automation.action.executed"]}}
    started["related"] = {"id": [f"prefect.flow-run.{run.id}"]}
    action = client.read_events(EventFilter.model_validate(started), limit=1).events[0]
    cause = next(r.id for r in action.related if r.role == "triggering-event").removeprefix("prefect.event.")
    event = client.read_events(EventFilter.model_validate({"id": {"id": [cause]}}), limit=1).events[0]
    if event.event != "lewis.expert.released":
        return f"because of the event {event.event} of {event.resource.id}"
    repo, old, new = (event.payload.get(key) for key in ("repo", "old", "new"))
    return f"because of a release: {repo} {short(str(old)) if old else '(not merged yet)'} → {short(str(new))}"
