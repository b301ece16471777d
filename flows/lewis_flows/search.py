"""The search: try values on one half of the documents, confirm the best on the other half, and register it."""

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import takewhile
from typing import Any

from prefect import State, flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.utilities.annotations import quote
from pydantic import BaseModel

from lewis.devices import default_device, precision
from lewis.errors import InputError, LewisError, nearest
from lewis.evaluation import step
from lewis.evaluation.harness.lm_eval import EvalSettings, tasks_digest
from lewis.evaluation.statistics.scored import MERGED, Scored, gain
from lewis.evaluation.statistics.scores import by_key
from lewis.evaluation.step import ModelScores
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.search import space, study
from lewis.search.study import Log, Objective, Trial
from lewis.steps.table import CALIBRATE, CHECK, CONTINUE, DIAGNOSE, DOWNLOAD, MEASURE
from lewis_flows import prefect_runs
from lewis_flows.merge import SEARCHED, Searched, begin, load, merge_flow, run_name
from lewis_flows.registration import MergeReport
from lewis_flows.runners import choose
from lewis_flows.turn import HOOKS, noted, turn
from lewis_flows.walk import Walk, finish, pin, submit
from lewis_tasks.evaluate import check_tasks
from lewis_tasks.search import compare_with_default, record_search, score_trial
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.caching import STOPPING
from lewis_tasks.support.failures import result_of, says_why

logger = logging.getLogger(__name__)
SEARCH, CONFIRM = "evaluate.documents=search", "evaluate.documents=confirm"  # disjoint halves
PART = "a quarter"
FEWEST = 8  # documents in the first quarter; with fewer, no trial is given up early


class SearchReport(BaseModel):
    """The result of a run of the flow `search`.

    Attributes:
        trials: all that was tried.
        best: YAML path -> value, of the winner.
        overrides: the same as text for `--set`.
        confirmed: rows of the winner against the unchanged recipe, on the other half of the documents.
        merge: report of the run that merged the winner, compared it with the champion and registered it.
        mlflow_run: id of the search's run.
    """

    recipe: str
    digest: str
    trials: list[dict[str, Any]]
    best: dict[str, Any]
    overrides: list[str]
    confirmed: list[dict[str, str]]
    merge: MergeReport | None
    mlflow_run: str


@flow(name=prefect_runs.SEARCH, flow_run_name=run_name, task_runner=choose.task_runner(), **HOOKS)
@says_why
@noted
def search_flow(
    recipe: str, overrides: list[str] | None = None, trials: int | None = None, minutes: float | None = None
) -> SearchReport | State[SearchReport]:
    """Search values: measure once; allocate, merge and score each trial; confirm, gate and register the best one.

    A search that was killed goes on where it was. Run again with more `trials`, it adds to those it has. The run ends
    as its best trial's merge does: as `Promoted` or `Rejected`, with the numbers; as `Completed` if it registers none.

    Args:
        recipe: the name of a recipe in the recipes folder; it has a `search` block. From the command line, a YAML
            file's path too.
        overrides: as of the flow `merge`.
        trials: how many in all, instead of the recipe's number.
        minutes: begin no further trial after this time, instead of the recipe's.
    """
    path = begin(recipe)
    run_tags.tag(recipe=path.stem, trigger=run_tags.trigger(run_tags.this_run()))
    with turn(path.with_suffix(".search"), str(flow_run.id)), ExitStack() as held:
        plan = load(path, overrides or [])
        metrics = study.objectives_of(plan)
        space.check(plan)
        assert plan.search is not None
        wanted = trials or plan.search.trials
        limit = minutes or plan.search.minutes
        tried = _Trials(plan, *_prepare(plan), metrics, held)
        best = tried.run(wanted, time.monotonic() + 60 * limit if limit else float("inf"))
        report, (name, line) = _confirm(recipe, plan, list(overrides or []), tried, best)
    return run_tags.ending(name, f"{len(report.trials)} trials; {line}", report)


def _prepare(plan: Recipe) -> tuple[dict[str, Any], str]:
    """Fetch, inspect and measure the models, once for all trials; return the first results and the tasks' digest."""
    tasks = submit(check_tasks, quote(space.with_values(plan, {}, SEARCH)))
    walk = Walk(plan, pin(plan, [tasks]))
    steps = (DOWNLOAD, CHECK, DIAGNOSE, CALIBRATE, CONTINUE, MEASURE)
    walk.go(walk.graph.towards(*(node.name for step in steps for node in walk.graph.of(step))))
    shown = walk.of(DIAGNOSE) if plan.inspect.on == "warn" else []  # its failure ends no merge either
    finish(*(future for future in walk.futures.values() if future not in shown))
    # A trial may vary the sets and passes: it looks for these itself, and finds most of them in the store.
    kept = [node.name for step in (DOWNLOAD, CHECK) for node in walk.graph.of(step)]
    return {name: walk.futures[name].result() for name in kept}, tasks.result()


class _Trials:
    """The trials of one search."""

    def __init__(
        self, plan: Recipe, known: dict[str, Any], tasks: str, metrics: tuple[str, ...], held: ExitStack
    ) -> None:
        self.plan, self.known, self.tasks = plan, known, tasks
        assert plan.search is not None
        self.search, self.settings = plan.search, _settings(plan, SEARCH)
        # Score the recipe as it is first: its scores tell whether higher is better, and how many documents there are.
        found = result_of(self.submit(plan, 0, "all", self.settings))
        scored = _scored(plan, found)
        first = scored.by_name
        unknown = [metric for metric in metrics if metric not in first]
        if unknown:
            raise InputError(f"search.metrics: there is no score {unknown[0]!r}{nearest(unknown[0], first)}")
        self.objectives = [Objective(metric, first[metric].higher_is_better) for metric in metrics]
        self.inputs = {files.ref: files.key for files in known.values() if isinstance(files, ModelFiles)}
        numbers = precision(default_device()) if self.settings.backend == "hf" else "fp32"
        self.log = Log(plan, self.objectives, {**self.inputs, MERGED: found.model}, tasks, held, numbers)
        part = _quarter(scored, metrics[0])
        prune = self.search.prune and len(metrics) == 1 and part >= FEWEST
        self.part = replace(self.settings, look=part) if prune else None

    def submit(self, recipe: Recipe, number: int, part: str, settings: EvalSettings) -> PrefectFuture[ModelScores]:
        """Start the task that merges and scores a recipe as a trial."""
        return submit(score_trial, quote(recipe), number, part, quote(self.known), settings)

    def run(self, wanted: int, deadline: float) -> Trial:
        """Make trials until there are enough, or no time is left; return the best trial.

        Raises:
            LewisError: if none could be scored.
        """
        failed = len(list(takewhile(lambda trial: trial.state == "failed", self.log.trials)))
        wanted += failed  # of an earlier run whose first trials all failed, such as on a full disk: they do not count
        while (left := wanted - len(self.log.trials)) > 0 and time.monotonic() < deadline:
            self._round(min(left, self.search.parallel))
            self.record(ended=False)
        if not self.log.front:
            reasons = {trial.reason for trial in self.log.trials if trial.reason}
            raise LewisError(f"none of {len(self.log.trials)} trials could be scored: {'; '.join(sorted(reasons)[:3])}")
        return self.log.front[0]

    def _round(self, count: int) -> None:
        live: list[tuple[Trial, Recipe]] = []
        for trial in [self.log.ask() for _ in range(count)]:
            try:
                live.append((trial, space.with_values(self.plan, trial.values, SEARCH)))
            except LewisError as error:
                self._fail(trial, error)
        if self.part is not None:
            best = self._best(self.part)
            live = [each for each, found in self._score(live, PART, self.part) if not self._give_up(each, found, best)]
        for (trial, _), found in self._score(live, "all", self.settings):
            scores = [found.by_name[objective.metric].value for objective in self.objectives]
            self.log.done(trial, scores)
            named = zip(self.objectives, scores, strict=True)
            shown = ", ".join(f"{objective.metric} {score:.4g}" for objective, score in named)
            leads = any(each.number == trial.number for each in self.log.front)
            logger.info("trial %d: %s%s", trial.number, shown, ", the best so far" * leads)

    def _best(self, part: EvalSettings) -> Scored | None:
        """Return the best trial's scores on a part of the documents, on which it was scored in its own round."""
        if not (best := self.log.front[:1]):
            return None
        live = [(best[0], space.with_values(self.plan, best[0].values, SEARCH))]
        return next((found for _, found in self._score(live, PART, part)), None)

    def _give_up(self, each: tuple[Trial, Recipe], found: Scored, best: Scored | None) -> bool:
        metric, trial = self.objectives[0].metric, each[0]
        compared = gain(found, best, metric) if best else None
        score, documents = found.by_name[metric].value, found.by_name[metric].samples
        p = compared.p_superior(0) if compared else 1.0
        behind = self.log.behind(trial, score, documents, p)
        if behind and compared:
            self.log.pruned(trial)
            logger.info(
                "trial %d: given up after %d documents, %.4g is worse than the best, p %.2g",
                *(trial.number, documents, score, p),
            )
        return behind

    def _score(
        self, live: list[tuple[Trial, Recipe]], part: str, settings: EvalSettings
    ) -> list[tuple[tuple[Trial, Recipe], Scored]]:
        futures = [self.submit(recipe, trial.number, part, settings) for trial, recipe in live]
        scored = []
        for each, future in zip(live, futures, strict=True):
            try:
                scored.append((each, _scored(self.plan, result_of(future))))
            except LewisError as error:
                if STOPPING.is_set():
                    raise
                self._fail(each[0], error)
        if tasks_digest(self.settings) != self.tasks:
            raise LewisError(
                "evaluate: a file of the tasks changed while the search worked, so its trials cannot be compared; run "
                "the search again, which begins with new trials"
            )
        return scored

    def _fail(self, trial: Trial, error: LewisError) -> None:
        self.log.failed(trial, str(error).partition("\n")[0])
        logger.warning("trial %d failed: %s", trial.number, error)

    def record(self, *, ended: bool) -> str:
        """Record the trials, and whether the search has ended; return the id of its MLflow run."""
        log = self.log
        about = log.digest, quote(self.objectives), quote(log.trials), quote(log.front), ended
        return str(result_of(submit(record_search, quote(self.plan), *about)))


def _confirm(
    recipe: str, plan: Recipe, overrides: list[str], tried: _Trials, best: Trial
) -> tuple[SearchReport, tuple[str, str]]:
    """Merge, gate and register the best on the half of the documents that no trial saw, next to the unchanged recipe.

    Return the report and the search's verdict: name and line of its state. The models are those that the trials had,
    whatever was released since; InputError if the recipe was edited since the search began.
    """
    settings = _settings(plan, CONFIRM)
    winner = space.with_values(plan, best.values, CONFIRM)
    run = tried.record(ended=True)
    scores = zip(tried.objectives, best.scores, strict=True)
    told = "Completed", f"the best is number {best.number}: {', '.join(f'{o.metric} {s:.4g}' for o, s in scores)}"
    merged = None
    if plan.register_as:
        handed = SEARCHED.set(Searched(plan, overrides, tried.inputs))
        try:
            ended = merge_flow(recipe, [*overrides, *best.overrides, CONFIRM], return_state=True)
        finally:
            SEARCHED.reset(handed)
        merged, told = run_tags.result_of_run(ended), (ended.name or "Completed", ended.message or "")
    default = tried.submit(plan, 0, "confirm", settings)
    chosen = tried.submit(winner, best.number, "confirm", settings)  # finds the scores that the merge made
    finish(default, chosen)
    rows = result_of(submit(compare_with_default, quote(plan), default, chosen))
    report = SearchReport(
        recipe=plan.name,
        digest=tried.log.digest,
        trials=[asdict(trial) for trial in tried.log.trials],
        best=dict(best.values),
        overrides=best.overrides,
        confirmed=rows,
        merge=merged if isinstance(merged, MergeReport) else None,
        mlflow_run=run,
    )
    return report, told


def _quarter(found: Scored, metric: str) -> int:
    """Return a quarter of the number of documents of a metric's largest task; 0 without a value per document."""
    samples = by_key(found.samples).get(metric)
    return max(len(part.documents) for part in samples.parts) // 4 if samples else 0


def _settings(plan: Recipe, documents: str) -> EvalSettings:
    varied = space.with_values(plan, {}, documents)
    assert varied.evaluate is not None
    return EvalSettings.of(varied.evaluate, varied.root)


def _scored(plan: Recipe, entry: ModelScores) -> Scored:
    return step.scored_models(plan.score_weights, {"trial": entry})[0]
