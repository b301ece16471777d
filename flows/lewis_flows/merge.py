"""The DAG: merge the models of a recipe, score the result, register it, and promote it if it is better."""

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import State, flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.runtime import deployment, flow_run
from prefect.utilities.annotations import quote

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation.statistics.scored import without_mark
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import AWAITS
from lewis.steps.graph import PREFLIGHT
from lewis.steps.table import ALLOCATE, CALIBRATE, CONTINUE, DIAGNOSE, DOWNLOAD, EVALUATE, MEASURE, MERGE
from lewis.store import housekeeping
from lewis_flows import approval, evaluate_elsewhere, prefect_runs, recipes_folder, release_event, secret_blocks
from lewis_flows.registration import Ended, MergeReport, register_merge, report_tables
from lewis_flows.runners import choose
from lewis_flows.scoring import Judged, score
from lewis_flows.service import recipes_page
from lewis_flows.turn import HOOKS, absorb, noted, of_group, turn
from lewis_flows.walk import Scores, Walk, finish, known, known_scores, pin, submit
from lewis_tasks.evaluate import check_tasks
from lewis_tasks.register import check_publish, find_champion
from lewis_tasks.report import report_densities, report_run
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support import patience
from lewis_tasks.support.failures import NotPublishedError, result_of, says_why
from lewis_tasks.support.flow_run import tally

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Searched:
    """The recipe and the models on which a search has tried its values.

    Attributes:
        plan: the recipe, as it was read when the search began.
        overrides: with which the recipe was read.
        keys: reference of each model -> the commits that the search has pinned.
    """

    plan: Recipe
    overrides: list[str]
    keys: Mapping[str, str]

    def check(self, now: Recipe) -> None:
        """Check that a recipe still has the values that the search began with; its comments may differ.

        Args:
            now: the recipe of the file as it is now, read with `overrides`.

        Raises:
            InputError: naming the keys that have another value.
        """
        before, after = (each.model_dump(mode="json", by_alias=True) for each in (self.plan, now))
        if changed := [key for key, value in after.items() if value != before[key]]:
            raise InputError(
                f"{now.name}: edited while its search worked: {', '.join(changed)}; the best values were found for "
                "the recipe as it was, so nothing was merged or registered; run the search again"
            )


SEARCHED: ContextVar[Searched | None] = ContextVar("searched", default=None)
"""The search whose best values the running merge confirms; None outside of a search."""


def run_name() -> str:
    """Return the name of a run until it is known what changed: flow and recipe; a run with an answer keeps its name."""
    if (context := FlowRunContext.get()) and context.flow_run and approval.answered(context.flow_run):
        return context.flow_run.name
    given = str(flow_run.parameters["recipe"])
    return f"{flow_run.flow_name} {Path(given).stem if '/' in given else given}"


@flow(name=prefect_runs.MERGE, flow_run_name=run_name, task_runner=choose.task_runner(), **recipes_page.after(HOOKS))
@says_why
@noted
def merge_flow(recipe: str, overrides: list[str] | None = None) -> MergeReport | State[MergeReport]:
    """Run the DAG of a recipe: resolve, download, measure, allocate, merge, evaluate, gate, register, promote.

    The run ends as `Promoted` or `Rejected`, with the numbers; as `Completed` if it registers nothing; as `Cached` if
    nothing was left to do, and the verdict is the last one's; as `Unpublished` if the Hub has not taken the champion.
    If a person has to approve the version, the run waits suspended and ends as `Approved` or `Refused`, and another one
    publishes what was approved; without a deployment it ends as `AwaitingApproval`. Its tags name the recipe, what
    started it, and the verdict.

    Args:
        recipe: the name of a recipe in the recipes folder. From the command line, a YAML file's path too.
        overrides: `key.path=value` each, as `lewis run --set`. A run of a deployment cannot allow code or publish so.
    """
    path = begin(recipe)
    run = run_tags.this_run()
    if version := approval.answered(run):
        return _answered(run, version, path, overrides or [])
    trigger = run_tags.trigger(run)
    run_tags.tag(recipe=path.stem, trigger=trigger)
    with turn(path, str(flow_run.id)):
        if trigger == "release":
            release_event.settle(path.stem)
        absorb(run)
        plan, keys = _recipe_and_keys(path, overrides or [])
        with of_group(plan, str(flow_run.id)):
            report, changed, (name, line) = _merge(plan, path, overrides or [], keys)
    if run.deployment_id:
        report.save(str(run.id))
    if (
        name == AWAITS
        and run.deployment_id
        and report.version
        and (changed or not approval.is_open(run.deployment_id, report.version))
    ):
        return approval.ask(run, report.version, "\n".join(f"* {reason}" for reason in report.verdict))
    if not changed:
        name, line = "Cached", f"{path.stem}: nothing has changed, everything was found done"
    return run_tags.ending(name, line, report)


def begin(recipe: str) -> Path:
    """Prepare a run of a recipe; return the recipe's file, which `find` and `check_deployment` have checked.

    What killed runs left half-written in the store, or among the temporary files, is removed.
    """
    choose.check()
    deployed = deployment.id is not None
    if deployed:  # a worker started this process for this run alone
        patience.begin()
    housekeeping.sweep()
    store.remove_abandoned()
    path = recipes_folder.find(recipe, paths=not deployed)
    recipes_folder.check_deployment(str(deployment.name or ""), path.stem)
    secret_blocks.load_for_run(path.stem)
    return path


def load(path: Path, overrides: list[str]) -> Recipe:
    """Read and check the recipe of this run, as `load_for_deployment` and `check_alone`; the tags name its team."""
    read = recipes_folder.load_for_deployment if deployment.id is not None else Recipe.load
    plan = read(path, overrides)
    recipes_folder.check_alone(path, plan)
    if plan.register_as and plan.register_as.team:
        run_tags.tag(team=plan.register_as.team)
    return plan


def _recipe_and_keys(path: Path, overrides: list[str]) -> tuple[Recipe, Mapping[str, str] | None]:
    """Read the recipe of this run, as `load`; within a search also the keys of the models that it found its values for.

    The flow cannot look at `SEARCHED` itself: it is sent to other processes with what its function names.
    """
    plan, searched = load(path, overrides), SEARCHED.get()
    if searched:
        searched.check(load(path, searched.overrides))
    return plan, searched.keys if searched else None


def _answered(run: FlowRun, version: str, path: Path, overrides: list[str]) -> State[MergeReport]:
    """Do what a person answered; if that makes a champion, another run does what is left, such as publishing."""
    state = approval.ask(run, version)
    if state.name == approval.APPROVED:
        try:
            plan = load(path, overrides)
            if plan.publish or (plan.evaluate and plan.evaluate.completes):
                approval.go_on(run)
        except (LewisError, httpx.HTTPError) as error:
            logger.warning("%s is the champion; the next run of the recipe does what is left: %s", version, error)
    return state


def _merge(
    plan: Recipe, path: Path, overrides: list[str], keys: Mapping[str, str] | None
) -> tuple[MergeReport, bool, tuple[str, str]]:
    """Run the DAG of a recipe, with models pinned as `pin` does by `keys`.

    Return its report, whether anything is new, even if only the verdict, and name and message of the run's state.
    """
    run_tags.note_text(plan)
    # The recipe is quoted: else Prefect takes each name in it for the result of a task that returned the same name, and
    # draws edges between tasks that have nothing to do with each other.
    queue = evaluate_elsewhere.queue_for(path) if plan.evaluate else ""
    tasks = submit(check_tasks, quote(plan), not queue) if plan.evaluate else None
    champion = submit(find_champion, plan.register_as.model, bool(tasks)) if plan.register_as else None
    publishable = submit(check_publish, quote(plan)) if plan.publish else None
    walk = Walk(plan, pin(plan, [tasks, publishable], keys))
    sources = [each.result() for name, each in walk.futures.items() if name != PREFLIGHT]
    run_tags.rename(plan, {source.ref: source.key for source in sources})
    walk.go(node for node in walk.graph if node.step is not EVALUATE)
    allocated, merged = walk.futures.get(ALLOCATE.name), walk.futures["merge experts"]
    finish(champion, *walk.of(CALIBRATE, CONTINUE, MEASURE, ALLOCATE))
    drawn = submit(report_densities, quote(plan), known(walk.of(MEASURE)), allocated) if allocated else None
    finish(drawn, *walk.of(MERGE))
    report = MergeReport.of(plan.name, merged.result(), allocated.result() if allocated else None)

    judged = score(walk, plan, path, overrides, queue, champion, tasks.result()) if tasks else Judged({})
    scores = without_mark(judged.scores)
    if scores:
        report_tables(plan, report, scores)
    ended = register_merge(plan, walk, report, champion, judged) if plan.register_as else Ended()
    _write_report(plan, walk, report, champion, ended.scores or scores, ended)
    if ended.published:
        try:
            report.published = getattr(result_of(ended.published), "url", None)
        except LewisError as error:
            raise NotPublishedError(f"{': '.join(ended.line)}; not published: {error}") from error
    # Not the downloads: on a machine that lost its store, models are loaded again, and nothing new comes of it.
    computed = any(future.state.name != "Cached" for future in walk.of(MEASURE, ALLOCATE, MERGE, EVALUATE))
    return report, computed or report.created or ended.changed or bool(ended.there and ended.there.new), ended.line


def _write_report(
    plan: Recipe, walk: Walk, report: MergeReport, champion: PrefectFuture[Any] | None, scores: Scores, ended: Ended
) -> None:
    """Write the report of the run; if that fails, the UI shows it and the run goes on, as the version is registered."""
    merged = walk.futures["merge experts"]
    facts = [known(merged), known(champion), known_scores(scores), known(ended.verdict)]
    work = tally(**{step.name: walk.of(step) for step in (DOWNLOAD, MEASURE, ALLOCATE, MERGE, EVALUATE)})
    about = (known(ended.version), work, quote(report.comparison), ended.there.url if ended.there else None)
    after = [ended.promoted or merged]
    for future in walk.of(DIAGNOSE):  # the UI shows its error, and the report what it measured
        future.wait()
    written = submit(report_run, quote(plan), *walk.inputs(plan), *facts, *about, wait_for=after)
    written.wait()
    if written.state.is_completed():
        report.page = Path(written.result())
