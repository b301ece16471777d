"""The DAG: merge the models of a recipe, score the result, register it, and promote it if it is better."""

from pathlib import Path
from typing import Any

from prefect import State, flow
from prefect.futures import PrefectFuture
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from prefect.utilities.annotations import quote
from pydantic import BaseModel

from lewis.errors import LewisError
from lewis.evaluation.step import ScoresEntry, eval_settings
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles, short_names
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import verdict_line
from lewis_flows import evaluate_elsewhere, prefect_runs, recipes_folder, secret_blocks
from lewis_flows.runners import choose
from lewis_flows.stages import fetch, guide, pin
from lewis_flows.submit import finish, known, submit
from lewis_flows.turn import HOOKS, turn
from lewis_tasks.evaluate import check_tasks, evaluate
from lewis_tasks.inspect import diagnose
from lewis_tasks.merge import merging
from lewis_tasks.publish import check_publish, publish
from lewis_tasks.register import find_champion, gate, promote, register
from lewis_tasks.report import report_run, report_scores
from lewis_tasks.resolve import settle
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.failures import NotPublishedError, result_of, says_why
from lewis_tasks.support.flow_run import tally


class MergeReport(BaseModel):
    """What a run of the DAG gives back.

    Attributes:
        recipe: its name.
        digest, folder: of the merged checkpoint, or adapter, in the store.
        adapter: what the adapter holds and what error it leaves; None for a full model.
        mean_density: expert -> parameter-weighted mean density; empty for a plain merge.
        scores: rows of the score table.
        comparison: rows of the merged model against each other model: gain, interval, wins, losses, p.
        kept: rows of how much of each expert's gain over the base is kept; empty if base or experts are not scored.
        version: `models:/name/version`, if the recipe registers.
        created: whether that version is new.
        promoted: whether it is the champion now.
        verdict: the gate's reasons.
        published: URL of the champion on the Hub, if the recipe publishes.
    """

    recipe: str
    digest: str
    folder: Path
    adapter: str | None = None
    mean_density: dict[str, float] = {}
    scores: list[dict[str, str]] = []
    comparison: list[dict[str, str]] = []
    kept: list[dict[str, str]] = []
    version: str | None = None
    created: bool = False
    promoted: bool = False
    verdict: list[str] = []
    published: str | None = None


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


def _merge(plan: Recipe, path: Path, overrides: list[str]) -> tuple[MergeReport, bool, tuple[str, str]]:
    """The DAG; gives its report, whether anything was computed, registered, promoted or published, and its verdict."""
    # Quote the recipe: else Prefect takes each name in it for the result of a task that returned the same name, and
    # draws edges between tasks that have nothing to do with each other.
    settings = eval_settings(plan) if plan.evaluate else None
    queue = evaluate_elsewhere.queue_for(path) if settings else ""
    tasks_digest = submit(check_tasks, quote(plan), settings, plan.root, not queue) if settings else None
    champion = submit(find_champion, plan.register_as.model, bool(settings)) if plan.register_as else None
    publishable = submit(check_publish, quote(plan)) if plan.publish else None

    pinned = pin(plan, [tasks_digest, publishable])
    run_tags.rename(run_tags.run_name(plan.name, [each.result().key for each in _all(pinned.base, pinned.experts)]))
    models = fetch(plan, pinned)
    base, experts, after = models.base, models.experts, [models.inspected]
    files = (known(base), known(experts))
    diagnosed = submit(diagnose, quote(plan), plan.blocks, *files, wait_for=after)
    sets, measured, allocated, drawn = guide(plan, models)
    merged = submit(
        merging(plan),
        *(quote(plan), plan.blocks, *files, allocated, "experts"),
        *((sets, measured) if plan.fits else ([], [])),
        wait_for=[] if allocated or sets else after,
    )
    uniform = None
    if allocated and plan.wants_uniform:
        uniform = submit(merging(plan, "uniform"), quote(plan), plan.blocks, *files, allocated, "uniform")
    finish(champion, *sets, *measured, allocated, drawn, merged, uniform)
    result = merged.result()
    report = MergeReport(recipe=plan.name, digest=result.digest, folder=result.folder)
    report.adapter = result.adapter.to_text() if result.adapter else None
    report.mean_density = allocated.result().means if allocated else {}

    scores: dict[str, PrefectFuture[ScoresEntry]] = {}
    if settings:
        to_score = _models_to_score(plan, base, experts, uniform, merged)
        current = champion.result() if champion else None
        incumbent = current.files("champion") if current else None
        if incumbent and incumbent.key != result.digest:
            to_score["champion"] = quote(incumbent)
            to_score[plan.label] = to_score.pop(plan.label)  # keep it the last: the pictures outline the last model
        if queue:
            scores = evaluate_elsewhere.scores(queue, plan, path.stem, overrides, to_score, known(tasks_digest), base)
        else:
            causes = {"uniform": uniform, "champion": champion}
            for label, model in to_score.items():
                cause = causes.get(label) or merged
                how = (settings, plan.root, known(tasks_digest))
                scores[label] = submit(evaluate, model, label, *how, wait_for=[cause])
        finish(*scores.values())
        table = submit(report_scores, quote(plan), known(scores), wait_for=[scores[plan.label]])
        finish(table)
        rows = table.result()
        report.scores, report.comparison, report.kept = rows["scores"], rows["comparison"], rows["kept"]

    verdict = version = promoted = published = None
    moved, told = False, ("Completed", "merged; the recipe registers nothing")
    inputs = [known(each) for each in (base, experts, sets, allocated)]
    if plan.register_as:
        causes_of_gate = [] if scores else [merged]
        verdict = submit(gate, quote(plan), known(champion), known(merged), scores, wait_for=causes_of_gate)
        version = submit(register, quote(plan), *inputs, known(merged), known(scores), wait_for=[verdict])
        finish(verdict, version)
        promoted = submit(promote, quote(plan), version, known(verdict), known(merged))
        finish(promoted)
        report.version, report.created = version.result().uri, version.result().created
        report.verdict, report.promoted = list(verdict.result().reasons), promoted.result()
        before = champion.result() if champion else None
        in_use = before.version.uri if before else None
        moved = report.promoted and in_use != report.version
        told = verdict_line(report.version, verdict.result(), champion=in_use)
        if plan.publish:
            published = submit(publish, quote(plan), known(version), known(merged), wait_for=[promoted])
            published.wait()  # raise its error after the report
    work = tally(
        download=[base, *experts],
        measure=measured,
        allocate=[allocated],
        merge=[merged, uniform],
        evaluate=scores.values(),
    )
    facts = [known(each) for each in (merged, champion, scores, verdict)]
    there = published.result() if published and published.state.is_completed() else None
    url = there.url if there else None
    about = (known(version), work, quote(report.comparison), url)
    written = submit(report_run, quote(plan), *inputs, *facts, *about, wait_for=[promoted or merged])
    diagnosed.wait()  # like the report's, its error is shown by the UI
    written.wait()  # do not raise its error: the version is registered even if the report failed, and the UI shows that
    if published:
        try:
            result_of(published)
        except LewisError as error:
            raise NotPublishedError(f"{': '.join(told)}; not published: {error}") from error
        report.published = url
    # Not the downloads: on a machine that lost its store, models are loaded again, and nothing new comes of it.
    results = [*measured, allocated, merged, uniform, *scores.values()]
    computed = any(future.state.name != "Cached" for future in results if future)
    return report, computed or report.created or moved or bool(there and there.new), told


def _models_to_score(
    plan: Recipe,
    base: PrefectFuture[ModelFiles] | None,
    experts: list[PrefectFuture[ModelFiles]],
    uniform: PrefectFuture[MergedModel] | None,
    merged: PrefectFuture[MergedModel],
) -> dict[str, Any]:
    """Label -> model, quoted, in the order of the table: the parents, the uniform baseline, the merged model."""
    models: dict[str, Any] = {"base": known(base)} if plan.scores_base else {}
    if plan.scores_experts:
        pairs = zip(short_names([e.model for e in plan.experts]), plan.experts, experts, strict=True)
        models |= {label: known(files) for label, entry, files in pairs if entry.model != plan.base_model}
    return {**models, **({"uniform": known(uniform)} if uniform else {}), plan.label: known(merged)}


def _all(base: Any, experts: list[Any]) -> list[Any]:
    return [*([base] if base else []), *experts]
