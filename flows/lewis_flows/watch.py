"""The poll: look up the newest commit of every model of every recipe, and announce those that no merge holds yet.

It also tells Prefect of new champions that it may not know: see `lewis_tasks.support.moves`.

The poll keeps no state of its own. The registry knows what was merged; Prefect knows what was announced, and how the
runs ended. So the next poll finds an event that was lost, or a run that died.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote
from pydantic import BaseModel

from lewis.errors import LewisError, TransientError
from lewis.models.source import commits_of, pin_all
from lewis.recipe.recipe import Recipe
from lewis.registry import releases
from lewis.registry.releases import Held, Moved
from lewis_flows import polls, prefect_runs, recipes_folder, release_event, secret_blocks
from lewis_flows.turn import tag_crashed_runs
from lewis_flows.walk import submit
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support import moves
from lewis_tasks.support.caching import RETRIES
from lewis_tasks.support.failures import says_why

RETRY_AFTER = timedelta(hours=1)  # after a failed run, announce its release again
ANSWER_WITHIN = timedelta(minutes=2)  # an announcement that has started no run by then was lost
REMEMBER = timedelta(hours=24)  # older announcements do not count
STUCK_AFTER = 3  # runs that failed

_RUNNER: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=8)  # each thread waits for the Hub


class WatchReport(BaseModel):
    """What one poll found.

    Attributes:
        checked: recipes that were compared with the registry.
        announced: `recipe: ref` of each release that this poll announced.
        waiting: `recipe: ref` of each release that was announced before, and whose run has not failed.
        problems: recipe -> why it could not be checked.
    """

    checked: list[str] = []
    announced: list[str] = []
    waiting: list[str] = []
    problems: dict[str, str] = {}


def _run_name() -> str:
    return f"watch {', '.join(flow_run.parameters['recipes'] or ['all recipes'])}"


@flow(
    name=prefect_runs.WATCH,
    flow_run_name=_run_name,
    task_runner=_RUNNER,
    on_completion=[polls.forget],
    on_failure=[run_tags.tag_end, polls.forget],
)
@says_why
def watch_flow(recipes: list[str] | None = None) -> WatchReport | State[WatchReport]:
    """Compare the models of each recipe with what its registered versions hold, and announce what is new.

    The run ends as `Announced`, with the releases; as `Problems`, if there are others than at the poll before; else as
    `Quiet`, also if a schedule started it and nothing could be checked, as at the poll before. `polls.forget` deletes
    those that a schedule started and that have nothing to tell.

    Args:
        recipes: names in the folder of recipes; by default all of them.

    Raises:
        TransientError: if MLflow, Prefect or the Hub does not answer; the next poll asks again.
    """
    try:
        return _watch(recipes)
    except Exception as error:
        scheduled = recipes is None and run_tags.is_scheduled()
        if not scheduled or polls.remember(0, {"": str(error)}):
            raise
        return Completed(name=polls.QUIET, message=f"as at the poll before: {error}")


def _watch(recipes: list[str] | None) -> State[WatchReport]:
    secret_blocks.load_for_run(None)
    moves.tell()
    tag_crashed_runs()
    found, problems = _compare(recipes)
    transient = [str(problem) for problem in problems.values() if isinstance(problem, TransientError)]
    if transient and not found:
        raise TransientError("nothing could be checked:\n" + "\n".join(dict.fromkeys(transient)))
    report = WatchReport(checked=list(found), problems={name: str(problem) for name, problem in problems.items()})
    others = recipes is not None or polls.remember(len(report.checked), report.problems)
    for name, text in report.problems.items():  # at each poll, but a warning only at the first
        get_run_logger().log(logging.WARNING if others else logging.INFO, "%s cannot be watched: %s", name, text)
    for name, moved in found.items():
        for move in moved:
            news = _is_news(name, move)
            if news:
                get_run_logger().info("%s: %s moved: %s -> %s", name, move.ref, move.old or "never merged", move.new)
                release_event.announce(name, move.ref, move.repo, move.old, move.new)
            (report.announced if news else report.waiting).append(f"{name}: {move.ref}")
    name, line = _told(report, others=others)
    get_run_logger().info("%s", line)
    if name != polls.QUIET:
        run_tags.tag(verdict=name.lower(), trigger=run_tags.trigger(run_tags.this_run()))
    return Completed(name=name, message=line, data=report)


def _told(report: WatchReport, *, others: bool) -> tuple[str, str]:
    """The name and the line of a poll's state; `others`: its problems are not those of the poll before."""
    counts = (len(report.checked), len(report.waiting), len(report.problems))
    checked = "recipes checked: {}; releases known already: {}; problems: {}".format(*counts)
    if report.announced:
        return polls.ANNOUNCED, f"{', '.join(report.announced)}; {checked}"
    if others and report.problems:
        return polls.PROBLEMS, "; ".join(
            f"{name}: {text.partition(chr(10))[0]}" for name, text in report.problems.items()
        )
    return polls.QUIET, checked


@task(name="heads", task_run_name="heads {name}", cache_policy=NO_CACHE, timeout_seconds=3600, **RETRIES)
def find_heads(recipe: Recipe, name: str) -> dict[str, str]:
    """The newest commits of base and experts of one recipe; `name` is for the UI."""
    return releases.heads(*pin_all(recipe))


def _compare(recipes: list[str] | None) -> tuple[dict[str, list[Moved]], dict[str, Exception]]:
    """What moved, of each recipe that could be checked; and the errors of the others."""
    problems: dict[str, Exception] = {}
    plans: dict[str, tuple[Recipe, list[Held]]] = {}
    for name in map(recipes_folder.name_of, recipes or recipes_folder.names()):
        try:
            plan = recipes_folder.load(name)
            if plan.register_as is None:
                get_run_logger().info("%s has no `register` block: there is nothing to compare releases with", name)
            else:
                plans[name] = plan, releases.merged(plan.register_as.model)
        except TransientError:  # MLflow does not answer, so no recipe can be checked
            raise
        except Exception as error:  # whatever is wrong with one recipe does not stop the others
            problems[name] = error
    asked = {name: submit(find_heads, quote(plan), name) for name, (plan, _) in plans.items()}
    found: dict[str, list[Moved]] = {}
    for name, (plan, held) in plans.items():
        try:
            found[name] = releases.moved(asked[name].result(), held, base=plan.base_model, root=plan.root)
        except (LewisError, OSError) as error:
            problems[name] = error
    return found, problems


def _is_news(recipe: str, move: Moved) -> bool:
    """Whether to announce a release: it was not announced yet, or its run did not merge it."""
    now = datetime.now(UTC)
    with _prefect() as client:
        times = _announcements(client, recipe, move, now)
        if not times:
            return True
        announced = max(times)
        _tell_if_stuck(client, recipe, move, min(times))
        soon = {"before_": now + ANSWER_WITHIN}  # leave out the runs that a schedule plans for later days
        if _runs(client, recipe, ("SCHEDULED", *prefect_runs.UNFINISHED), expected_start_time=soon):
            return False
        ended = _runs(client, recipe, prefect_runs.ENDED, end_time={"after_": announced})
    answers = [run for run in ended if not run_tags.did_its_work(run) or _looked_since(run, announced)]
    if not answers:
        return now - announced >= ANSWER_WITHIN
    last = answers[0]
    if last.state_type == "FAILED":
        return last.end_time is None or now - last.end_time >= RETRY_AFTER
    return not run_tags.did_its_work(last)


def _looked_since(run: FlowRun, announced: datetime) -> bool:
    """Whether a run looked up the newest commits after an announcement; a run that was skipped did not."""
    began = run.start_time or run.expected_start_time
    return run.state_name != "Skipped" and began is not None and began >= announced


def _tell_if_stuck(client: SyncPrefectClient, recipe: str, move: Moved, since: datetime) -> None:
    """Tell of a release that was announced and whose runs keep failing."""
    failed = _runs(client, recipe, ("FAILED", "CRASHED"), end_time={"after_": since})
    if len(failed) >= STUCK_AFTER:
        why = (failed[0].state.message if failed[0].state else None) or "it says not why"
        release_event.announce_stuck(recipe, move.ref, move.repo, move.new, why.partition("\n")[0])


def _announcements(client: SyncPrefectClient, recipe: str, move: Moved, now: datetime) -> list[datetime]:
    """When a release was announced."""
    resource = {"id": [release_event.resource_id(move.repo)], "labels": {"lewis.recipe": recipe}}
    wanted = {"occurred": {"since": now - REMEMBER}, "event": {"name": [release_event.EVENT]}, "resource": resource}
    events = client.read_events(EventFilter.model_validate(wanted), limit=50).events  # the server gives 50 at most
    commits = {move.new, *commits_of(move.new)}  # of `base+adapter`, a webhook knows only the part that moved
    return [e.occurred for e in events if e.payload.get("ref") == move.ref and e.payload.get("new") in commits]


def _runs(client: SyncPrefectClient, recipe: str, states: tuple[str, ...], **limits: Any) -> list[FlowRun]:
    """The newest merges of a recipe in some states, the last to end first."""
    newest = FlowRunSort.END_TIME_DESC
    runs = prefect_runs.of_flows(client, (prefect_runs.MERGE,), {"type": {"any_": states}}, newest, **limits)
    return [run for run in runs if prefect_runs.recipe_of(run) == recipe]


@contextmanager
def _prefect() -> Iterator[SyncPrefectClient]:
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPError as error:
        raise TransientError(f"Prefect's history cannot be read ({error!r}); is its server up?") from error
