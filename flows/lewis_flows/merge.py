"""The DAG: merge the models of a recipe, score the result, register it, and promote it if it is better."""

from pathlib import Path
from typing import Any

from prefect import State, flow
from prefect.futures import PrefectFuture
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from prefect.utilities.annotations import quote

from lewis.errors import LewisError
from lewis.recipe.recipe import Recipe
from lewis.reports.verdict_line import verdict_line
from lewis.steps.graph import CHAMPION, Graph, graph
from lewis.steps.table import ALLOCATE, CALIBRATE, DIAGNOSE, DOWNLOAD, EVALUATE, MEASURE, MERGE
from lewis_flows import evaluate_elsewhere, prefect_runs, recipes_folder, secret_blocks
from lewis_flows.merge_report import MergeReport
from lewis_flows.runners import choose
from lewis_flows.turn import HOOKS, turn
from lewis_flows.walk import Futures, finish, known, pin, submit, walk
from lewis_tasks.evaluate import check_tasks
from lewis_tasks.publish import check_publish, publish
from lewis_tasks.register import find_champion, gate, promote, register
from lewis_tasks.report import report_densities, report_run, report_scores
from lewis_tasks.resolve import settle
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.assets import artifact_prefix
from lewis_tasks.support.failures import NotPublishedError, result_of, says_why
from lewis_tasks.support.flow_run import tally


def _run_name() -> str:
    return f"merge {Path(str(flow_run.parameters['recipe'])).stem}"


@flow(name=prefect_runs.MERGE, flow_run_name=_run_name, task_runner=choose.task_runner(), **HOOKS)
@says_why
def merge_flow(
    recipe: str, overrides: list[str] | None = None, settle_seconds: float = 0
) -> MergeReport | State[MergeReport]:
    """Resolve, download, measure, allocate, merge, evaluate, gate, register, promote.

    The run ends as `Promoted` or `Rejected`, with the numbers; as `Completed` if it registers nothing; or as `Cached`
    if nothing was left to do. It ends as `Skipped`, without a report, if a deployment started it and another run of the
    recipe waits for its turn already. As `Unpublished` if the Hub has not taken the champion. Its tags name the recipe,
    what started it, and the verdict.

    Args:
        recipe: the name of a recipe in the recipes folder. From the command line, a YAML file's path too.
        overrides: `key.path=value` each, as `lewis run --set`. A run of a deployment cannot allow code or publish so.
        settle_seconds: wait until no model has moved for so long; for runs that a release starts.
    """
    choose.check()
    deployed = deployment.id is not None
    path = recipes_folder.find(recipe, paths=not deployed)
    secret_blocks.load_for_run(path.stem)
    run_tags.tag(recipe=path.stem, trigger=run_tags.trigger(run_tags.this_run()))
    with turn(path, str(flow_run.id), skip=deployed) as ours:
        if not ours:
            run_tags.tag(verdict="skipped")
            return Completed(
                name="Skipped", message=f"a run of {path.stem} waits already and will find the newest state"
            )
        load = recipes_folder.load_for_deployment if deployed else Recipe.load
        plan = load(path, overrides or [])
        recipes_folder.check_alone(path, plan)
        if plan.register_as and plan.register_as.team:
            run_tags.tag(team=plan.register_as.team)
        if settle_seconds > 0:
            settle(quote(plan), settle_seconds, return_state=False)
        report, changed, (name, line) = _merge(plan, path, overrides or [])
    if not changed:
        name, line = "Cached", f"{path.stem}: nothing has changed, everything was found done"
    run_tags.tag(verdict=name.lower())
    return Completed(name=name, message=line, data=report)


class _Run:
    """One run of the DAG: walks the recipe's graph, then does by hand what depends on the scores."""

    def __init__(self, plan: Recipe, path: Path, overrides: list[str]) -> None:
        """Check what can be checked before any model is looked at, then pin the models."""
        # The recipe is quoted: else Prefect takes each name in it for the result of a task that returned the same
        # name, and draws edges between tasks that have nothing to do with each other.
        self.plan, self.path, self.overrides = plan, path, overrides
        self.graph, self.prefix = graph(plan), artifact_prefix(plan)
        self.queue = evaluate_elsewhere.queue_for(path) if plan.evaluate else ""
        self.tasks = submit(check_tasks, quote(plan), not self.queue) if plan.evaluate else None
        registers = plan.register_as
        self.champion = submit(find_champion, registers.model, bool(plan.evaluate)) if registers else None
        checks = [self.tasks, submit(check_publish, quote(plan)) if plan.publish else None]
        self.futures: Futures = pin(plan, checks)
        keys = [each.result().key for name, each in self.futures.items() if name.startswith("resolve ")]
        run_tags.rename(run_tags.run_name(plan.name, keys))

    def merge(self) -> MergeReport:
        """Everything before the scores."""
        merges = Graph(node for node in self.graph if node.step is not EVALUATE)
        self.futures = walk(merges, self.futures, self.prefix)
        allocated = self.futures.get(ALLOCATE.name)
        finish(self.champion, *self.of(CALIBRATE), *self.of(MEASURE), allocated)
        if allocated:
            measured = known(self.of(MEASURE))
            self.futures["report densities"] = submit(report_densities, quote(self.plan), measured, allocated)
        finish(*self.of(MERGE))
        merged = self.merged.result()
        report = MergeReport(recipe=self.plan.name, digest=merged.digest, folder=merged.folder)
        report.adapter = merged.adapter.to_text() if merged.adapter else None
        report.mean_density = allocated.result().means if allocated else {}
        return report

    def score(self, report: MergeReport) -> None:
        """Score the merged model beside its parents and the champion: here, or by workers of another queue."""
        current = self.champion.result() if self.champion else None
        values = {CHAMPION: current.files("champion") if current else None}
        begun = {**self.futures, **({CHAMPION: self.champion} if self.champion else {})}
        scoring = Graph(self.graph.of(EVALUATE))
        if self.queue:
            tasks = self.tasks.result() if self.tasks else ""
            begun |= evaluate_elsewhere.scores(
                self.queue, self.plan, self.path.stem, self.overrides, scoring, begun, values, tasks
            )
        else:
            begun = walk(scoring, begun, self.prefix, values)
        self.futures = begun
        finish(*self.scores.values())
        table = submit(report_scores, quote(self.plan), known(self.scores), wait_for=[self.scores[self.plan.label]])
        finish(table)
        rows = table.result()
        report.scores, report.comparison, report.kept = rows["scores"], rows["comparison"], rows["kept"]

    @property
    def merged(self) -> PrefectFuture[Any]:
        """The merged model."""
        return self.futures["merge experts"]

    @property
    def scores(self) -> Futures:
        """Label -> scores, in the order of the table."""
        names = [node.name for node in self.graph.of(EVALUATE) if node.name in self.futures]
        return {name.removeprefix(f"{EVALUATE.name} "): self.futures[name] for name in names}

    def of(self, step: Any) -> list[PrefectFuture[Any]]:
        """The futures of a step's nodes."""
        return [self.futures[node.name] for node in self.graph.of(step) if node.name in self.futures]

    def inputs(self) -> list[quote]:
        """Base, experts, calibration sets and densities, for those that write them down."""
        plan = self.plan
        base = self.futures[f"download {plan.base_model}"] if plan.base_model else None
        experts = [self.futures[f"download {entry.model}"] for entry in plan.experts]
        return [known(each) for each in (base, experts, self.of(CALIBRATE), self.futures.get(ALLOCATE.name))]


def _merge(plan: Recipe, path: Path, overrides: list[str]) -> tuple[MergeReport, bool, tuple[str, str]]:
    """The DAG; gives its report, whether anything was computed, registered, promoted or published, and its verdict."""
    run = _Run(plan, path, overrides)
    report = run.merge()
    if plan.evaluate:
        run.score(report)
    merged, champion, scores = run.merged, run.champion, run.scores
    verdict = version = promoted = published = None
    moved, line = False, ("Completed", "merged; the recipe registers nothing")
    if plan.register_as:
        after = [] if scores else [merged]
        verdict = submit(gate, quote(plan), known(champion), known(merged), scores, wait_for=after)
        version = submit(register, quote(plan), *run.inputs(), known(merged), known(scores), wait_for=[verdict])
        finish(verdict, version)
        promoted = submit(promote, quote(plan), version, known(verdict), known(merged))
        finish(promoted)
        report.version, report.created = version.result().uri, version.result().created
        report.verdict, report.promoted = list(verdict.result().reasons), promoted.result()
        before = champion.result() if champion else None
        in_use = before.version.uri if before else None
        moved = report.promoted and in_use != report.version
        line = verdict_line(report.version, verdict.result(), champion=in_use)
        if plan.publish:
            published = submit(publish, quote(plan), known(version), known(merged), wait_for=[promoted])
            published.wait()  # raise its error after the report
    work = tally(**{step.name: run.of(step) for step in (DOWNLOAD, MEASURE, ALLOCATE, MERGE, EVALUATE)})
    facts = [known(each) for each in (merged, champion, scores, verdict)]
    there = published.result() if published and published.state.is_completed() else None
    url = there.url if there else None
    about = (known(version), work, quote(report.comparison), url)
    written = submit(report_run, quote(plan), *run.inputs(), *facts, *about, wait_for=[promoted or merged])
    for future in (*run.of(DIAGNOSE), written):  # their errors are shown by the UI: the version is registered anyway
        future.wait()
    if published:
        try:
            result_of(published)
        except LewisError as error:
            raise NotPublishedError(f"{': '.join(line)}; not published: {error}") from error
        report.published = url
    # Not the downloads: on a machine that lost its store, models are loaded again, and nothing new comes of it.
    computed = any(
        each.state.name != "Cached" for step in (MEASURE, ALLOCATE, MERGE, EVALUATE) for each in run.of(step)
    )
    return report, computed or report.created or moved or bool(there and there.new), line
