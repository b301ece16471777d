"""The flow run that a task belongs to: its name, what started it, where the UI shows it."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events.filters import EventFilter
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run as current
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import State
from prefect.utilities.urls import url_for

from lewis.models.source import commits_of
from lewis.redact import redacted
from lewis.reports.run_report import duration, short

logger = logging.getLogger(__name__)
EDITED = "edited"  # tag of a run that an edit of its recipe started
MAX_NAMED = 4  # commits in the name of a run; a list of runs has no room for more


def rename(name: str) -> None:
    """Rename the flow run, now that more is known. The name is only for people: a failure is logged, not raised."""
    try:
        once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
        with once, get_client(sync_client=True, httpx_settings={"timeout": 5}) as client:
            client.update_flow_run(UUID(str(current.id)), name=name)
    except Exception as error:
        logger.warning("the run keeps its name: Prefect did not take %r (%s)", name, error)


def name_task(name: str) -> None:
    """Give the task that runs a name that tells what it found out; it is shown once the task has ended."""
    if context := TaskRunContext.get():
        context.task_run.name = name  # sent with the task's last state


def tag(run: UUID | None = None, **values: str) -> None:
    """Add tags such as `recipe:tiny` to a flow run, by which people filter; a failure is logged, not raised.

    Args:
        run: the flow run; by default, this one.
        values: kind -> value. A kind has one value: the new one takes the place of the old one.
    """
    try:
        of = run or UUID(str(current.id))
        once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
        with once, get_client(sync_client=True, httpx_settings={"timeout": 5}) as client:
            kept = [each for each in client.read_flow_run(of).tags if each.partition(":")[0] not in values]
            client.update_flow_run(of, tags=[*kept, *(f"{kind}:{value}" for kind, value in values.items())])
    except Exception as error:
        logger.warning("the run gets no tags: Prefect did not take %s (%s)", values, error)


def tag_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of flows: tag a run that failed, crashed or was cancelled with the name of that state as its verdict."""
    tag(flow_run.id, verdict=(state.name or state.type.value).lower())


HOOKS: dict[str, Any] = {"on_failure": [tag_end], "on_crashed": [tag_end], "on_cancellation": [tag_end]}
"""Arguments of `@flow`: every run has a verdict; one that comes to its end gives its own."""


def trigger(run: FlowRun) -> str:
    """What started a run, in a word: `search`, `edit`, `schedule`, `release` or `hand`; `why` has the sentence."""
    if run.parent_task_run_id:
        return "search"
    if EDITED in run.tags:
        return "edit"
    kind = run.created_by.type if run.created_by else None
    return {"SCHEDULE": "schedule", "AUTOMATION": "release"}.get(str(kind), "hand")


def run_name(recipe: str, keys: Sequence[str], digest: str = "") -> str:
    """`merge tiny 5c1f0a2b (3f2a91c0+8d01b2e4)`: the recipe, the digest once it is known, base and experts.

    Args:
        recipe: its name.
        keys: commit key of each model; of `base+adapter`, only the adapter's is shown.
        digest: of the merge.
    """
    named = [short(commits_of(key)[-1]) for key in keys[:MAX_NAMED]]
    more = [f"{len(keys) - MAX_NAMED} more"] if len(keys) > MAX_NAMED else []
    return " ".join(part for part in ("merge", recipe, short(digest), f"({'+'.join(named + more)})") if part)


def tags() -> dict[str, str]:
    """Tags for MLflow that lead back to the flow run."""
    return {"lewis.prefect.flow_run_id": str(current.id), "lewis.prefect.url": url()}


def url() -> str:
    """Where Prefect's UI shows the flow run."""
    return redacted(url_for("flow-run", obj_id=str(current.id)) or "")


def this_run() -> FlowRun:
    """The flow run as the server knows it."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(str(current.id)))


def is_scheduled() -> bool:
    """Whether a schedule started this flow run; it is known without asking the server."""
    context = FlowRunContext.get()
    return bool(context and context.flow_run and context.flow_run.auto_scheduled)


def why(run: FlowRun) -> str:
    """What started a run: `by hand`, `by schedule (cron 0 3 * * *)`, `because of a release: org/math 1a2b → 3c4d`."""
    made = run.created_by
    if run.parent_task_run_id:
        return "by another flow"
    if EDITED in run.tags:
        return "because the recipe was edited"
    if made is None or made.type not in ("SCHEDULE", "AUTOMATION"):
        return "by hand"
    # The server may have forgotten the schedule or event; then fall back to the name that is kept in the run.
    with suppress(Exception), get_client(sync_client=True) as client:
        return f"by schedule ({_schedule(client, run)})" if made.type == "SCHEDULE" else _event(client, run)
    return f"by {made.type.lower()} {made.display_value}"


def tally(**steps: Iterable[PrefectFuture[Any] | None]) -> dict[str, tuple[int, int]]:
    """Step -> (how many of its tasks were computed, how many came from the cache)."""
    states = {step: [future.state.name for future in futures if future] for step, futures in steps.items()}
    return {step: (len(names) - names.count("Cached"), names.count("Cached")) for step, names in states.items()}


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
    """Look up the action that created the run, then the event that triggered the action."""
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
