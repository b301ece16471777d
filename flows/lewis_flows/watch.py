"""The poll: look up the newest commit of every model of every recipe, and announce those that no merge holds yet.

It also reports new champions that Prefect may not know (`lewis_tasks.support.moves`), and ends what waits for an answer
that is needed no more (`lewis_flows.approval`).

The registry knows what was merged; Prefect knows what was announced, and how the runs ended. So the next poll finds an
event that was lost, or a run that died. What the last poll found is kept in the store, for `lewis status`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any

import httpx
from filelock import Timeout
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from pydantic import BaseModel

from lewis import store
from lewis.errors import LewisError, TransientError
from lewis.models.source import commits_of, pin_all
from lewis.recipe.recipe import Recipe
from lewis.registry import releases
from lewis.registry.releases import Held, Moved
from lewis_flows import (
    approval,
    earlier_runs,
    evaluation_files,
    polls,
    prefect_runs,
    recipes_folder,
    release_event,
    secret_blocks,
)
from lewis_flows.polls import RETRY_AFTER
from lewis_flows.turn import tag_crashed_runs
from lewis_tasks.support import events, moves
from lewis_tasks.support.flow_run import did_its_work

logger = logging.getLogger("lewis.watch")

ANSWER_WITHIN = timedelta(minutes=2)  # an announcement that has started no run by then was lost
REMEMBER = timedelta(hours=24)  # older announcements do not count
STUCK_AFTER = 3  # runs that failed
_ASK = 8  # recipes that the Hub is asked about at the same time


class WatchReport(BaseModel):
    """The findings of one poll.

    Attributes:
        checked: recipes that were compared with the registry.
        announced: `recipe: ref` of each release that this poll announced; `recipe: its file` of a text that it
            started a merge of.
        waiting: likewise, of each release or edit that was announced before, and whose run has not failed; or that
            waits for a new commit of a model that is broken on the Hub itself, or for an edit of the recipe, or until a
            paused deployment is resumed.
        problems: recipe -> why it could not be checked.
    """

    checked: list[str] = []
    announced: list[str] = []
    waiting: list[str] = []
    problems: dict[str, str] = {}


def poll_once() -> bool:
    """Poll all recipes, unless another process is doing that now; return the result of `poll_all`, else False."""
    try:
        with store.SharedLock("poll").acquire(timeout=0):
            return poll_all()
    except Timeout:
        return False


def poll_all() -> bool:
    """Poll all recipes; log and notify of problems if they differ from those of the poll before.

    Returns:
        whether it announced something, or found other problems, champions or versions that wait than the poll before.
    """
    before = polls.champions()
    try:
        report = poll()
        checked, problems, announced = len(report.checked), report.problems, report.announced
    except (LewisError, OSError, httpx.HTTPError) as error:
        checked, problems, announced = 0, {"": str(error)}, []
    if not polls.remember(checked, problems):
        return bool(announced) or polls.champions() != before
    for name, text in problems.items():
        logger.warning("%s cannot be watched: %s", name or "the recipes", text)
    if not problems:
        logger.info("all recipes can be watched again")
        return True
    try:
        release_event.announce_problems(problems)
    except LewisError as error:
        logger.info("nobody is notified of that: %s", error)
    return True


def poll(recipes: list[str] | None = None) -> WatchReport:
    """Compare the models of each recipe with what its registered versions hold, and announce what is new.

    Args:
        recipes: names in the folder of recipes; by default all of them.

    Raises:
        TransientError: if MLflow, Prefect or the Hub does not answer; the next poll asks again.
    """
    secret_blocks.load_for_run(None)
    moves.report()
    tag_crashed_runs()
    try:
        approval.settle()
    except (LewisError, httpx.HTTPError) as error:
        logger.info("runs may still wait for an answer that they need no more: %s", error)
    found, problems, loaded = _compare(recipes)
    transient = [str(problem) for problem in problems.values() if isinstance(problem, TransientError)]
    if transient and not found:
        raise TransientError("nothing could be checked:\n" + "\n".join(dict.fromkeys(transient)))
    report = WatchReport(checked=list(found), problems={name: str(problem) for name, problem in problems.items()})
    for name, (moved, heads) in found.items():
        broken = bool(moved) and _is_broken(loaded[name], heads)
        for move in moved:
            news = not broken and _is_news(name, move)
            if news:
                logger.info("%s: %s moved: %s -> %s", name, move.ref, move.old or "never merged", move.new)
                release_event.announce(name, move.ref, move.repo, move.old, move.new)
            (report.announced if news else report.waiting).append(f"{name}: {move.ref}")
    _repeat_releases([recipe for recipe in loaded.values() if not recipe.register_as], report)
    # Where a model has moved too, the run of that release merges the file as it is.
    also = {name for name, (moved, _) in found.items() if moved}.union(problems)
    _merge_edits([recipe for name, recipe in loaded.items() if name not in also], report)
    return report


def _repeat_releases(recipes: Sequence[Recipe], report: WatchReport) -> None:
    """Announce the last release of each recipe again that no run has merged; for recipes that register nothing.

    No version says what these were merged from, so their releases come by webhook alone.
    """
    for recipe in recipes:
        name = recipe.name
        move = _unmerged_release(name)
        if move and not _is_broken(recipe, {move.ref: move.new}) and _is_news(name, move):
            logger.info("%s: no run has merged %s %s; it is announced again", name, move.ref, move.new)
            release_event.announce(name, move.ref, move.repo, move.old, move.new)
            report.announced.append(f"{name}: {move.ref}")


def _unmerged_release(recipe: str) -> Moved | None:
    """Return the last announced release of a recipe, if no run has merged the newest commits since; else None."""
    with _prefect() as client:
        found = release_event.announced(client, events.now(client) - REMEMBER, recipe)
        if not found:
            return None
        last = found[0]
        for run in _runs(client, recipe, prefect_runs.ENDED, end_time={"after_": last.occurred}):
            if did_its_work(run) and _looked_since(run, last.occurred) and not run.parameters.get("overrides"):
                return None
    release = last.payload
    return Moved(str(release.get("ref")), str(release.get("repo")), release.get("old"), str(release.get("new")))


def _merge_edits(recipes: Sequence[Recipe], report: WatchReport) -> None:
    """Start a merge of each recipe whose text no run has merged, unless the run of the edit may still merge it."""
    with _prefect() as client:
        merged = earlier_runs.merged(client, [recipe.name for recipe in recipes])
        for name, text in [(each.name, each.text) for each in recipes if earlier_runs.is_unmerged(each, merged)]:
            deployment = prefect_runs.deployment(client, f"{prefect_runs.MERGE}/{name}")
            if deployment is None or deployment.version != recipes_folder.version(text.encode()):
                continue  # the deploy of the file starts a run
            began, now = earlier_runs.edited(client, deployment), events.now(client)
            waits = deployment.paused or name in due(client, now)
            news = not waits and (began is None or _came_to_nothing(client, name, began, now))
            if news:
                logger.info("%s: no run has merged what its file says now; one starts", name)
                earlier_runs.start_of_edit(client, deployment.id)
            (report.announced if news else report.waiting).append(f"{name}: its file")


def _compare(
    recipes: list[str] | None,
) -> tuple[dict[str, tuple[list[Moved], dict[str, str]]], dict[str, Exception], dict[str, Recipe]]:
    """Compare recipes with their versions: moved models and newest commits of each; its error; all loaded recipes."""
    problems, loaded = dict[str, Exception](), dict[str, Recipe]()
    plans: dict[str, tuple[Recipe, list[Held]]] = {}
    for name in map(recipes_folder.name_of, recipes or recipes_folder.names()):
        try:
            plan = recipes_folder.load(name)
            evaluation_files.check(plan)
            loaded[name] = plan
            if plan.register_as is None:
                logger.debug("%s has no `register` block: there is nothing to compare releases with", name)
            else:
                plans[name] = plan, releases.merged(plan.register_as.model)
        except TransientError:  # MLflow does not answer, so no recipe can be checked
            raise
        except Exception as error:  # whatever is wrong with one recipe does not stop the others
            problems[name] = error
    found, heads = dict[str, tuple[list[Moved], dict[str, str]]](), dict[str, dict[str, str]]()
    with ThreadPoolExecutor(_ASK) as pool:
        asked = {name: pool.submit(_heads, plan) for name, (plan, _) in plans.items()}
        for name, (plan, held) in plans.items():
            try:
                heads[name] = asked[name].result()
                moved = releases.moved(heads[name], held, base=plan.base_model, root=plan.root)
                found[name] = moved, heads[name]
            except (LewisError, OSError) as error:
                problems[name] = error
    polls.note_missed(heads, {name: held for name, (_, held) in plans.items()}, recipes_folder.names())
    return found, problems, loaded


def _heads(recipe: Recipe) -> dict[str, str]:
    """The newest commits of base and experts."""
    return releases.heads(*pin_all(recipe))


def _is_broken(recipe: Recipe, heads: Mapping[str, str]) -> bool:
    """Whether one of the commits `heads` is broken on the Hub itself, so that no run can succeed before a new one."""
    commits = {commit for key in heads.values() for commit in commits_of(key)}
    with _prefect() as client:
        return bool(earlier_runs.still_broken(client, recipe, commits))


def _is_news(recipe: str, move: Moved) -> bool:
    """Whether to announce a release: it was not announced yet, or its run did not merge it; and nobody paused it.

    An announcement before that of another commit does not count: the author took the other commit back since.
    """
    with _prefect() as client:
        if prefect_runs.is_paused(client, recipe):
            return False
        now = events.now(client)  # the server says when runs ended
        found = release_event.announced(client, now - REMEMBER, recipe, move.repo)
        commits = {move.new, *commits_of(move.new)}  # of `base+adapter`, a webhook knows only the part that moved
        of_ref = (each for each in found if each.payload.get("ref") == move.ref)
        times = [each.occurred for each in takewhile(lambda each: each.payload.get("new") in commits, of_ref)]
        if not times:
            return True
        _report_if_stuck(client, recipe, move, min(times))
        return recipe not in due(client, now) and _came_to_nothing(client, recipe, max(times), now)


def due(client: SyncPrefectClient, now: datetime) -> set[str]:
    """Return the recipes of which a merge is running, or begins soon, not those whose run waits for a person."""
    soon = {"before_": now + ANSWER_WITHIN}  # leave out the runs that a schedule plans for later days
    states = ("SCHEDULED", *(state for state in prefect_runs.UNFINISHED if state != "PAUSED"))
    return set(map(prefect_runs.recipe_of, _merges(client, states, expected_start_time=soon)))


def _came_to_nothing(client: SyncPrefectClient, recipe: str, announced: datetime, now: datetime) -> bool:
    """Whether no run merged what was announced at `announced`, and `now` is late enough to announce it again."""
    if any(_looked_since(run, announced) for run in _runs(client, recipe, ("PAUSED",))):
        return False
    ended = _runs(client, recipe, prefect_runs.ENDED, end_time={"after_": announced})
    answers = [run for run in ended if not did_its_work(run) or _looked_since(run, announced)]
    if not answers:
        return now - announced >= ANSWER_WITHIN
    last = answers[0]
    if last.state_type == "FAILED":
        return last.end_time is None or now - last.end_time >= RETRY_AFTER
    return not did_its_work(last)


def _looked_since(run: FlowRun, announced: datetime) -> bool:
    """Whether a run looked up the newest commits after an announcement; a run that was skipped did not."""
    began = run.start_time or run.expected_start_time
    return run.state_name != prefect_runs.SKIPPED and began is not None and began >= announced


def _report_if_stuck(client: SyncPrefectClient, recipe: str, move: Moved, since: datetime) -> None:
    """Send the event of a stuck release if `STUCK_AFTER` runs have failed since it was first announced."""
    failed = _runs(client, recipe, ("FAILED", "CRASHED"), end_time={"after_": since})
    if len(failed) >= STUCK_AFTER:
        why = (failed[0].state.message if failed[0].state else None) or "it says not why"
        release_event.announce_stuck(recipe, move.ref, move.repo, move.new, why.partition("\n")[0])


def _runs(client: SyncPrefectClient, recipe: str, states: tuple[str, ...], **limits: Any) -> list[FlowRun]:
    """The merges of a recipe in some states, the last to end first."""
    return [run for run in _merges(client, states, **limits) if prefect_runs.recipe_of(run) == recipe]


def _merges(client: SyncPrefectClient, states: tuple[str, ...], **limits: Any) -> Iterator[FlowRun]:
    return prefect_runs.all_of_flows(client, (prefect_runs.MERGE,), states, **limits)


@contextmanager
def _prefect() -> Iterator[SyncPrefectClient]:
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPError as error:
        raise TransientError(f"Prefect's history cannot be read ({error!r}); is its server up?") from error
