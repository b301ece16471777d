"""Artifacts for the Prefect UI, with stable keys: pictures and tables of densities and scores, the run's report."""

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import chain
from shlex import quote
from typing import TypeVar

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.errors import InputError
from lewis.evaluation.documents import side_by_side
from lewis.evaluation.gate import Verdict
from lewis.evaluation.statistics.retained_gain import kept_gains, kept_rows
from lewis.evaluation.statistics.scored import comparison_rows, intervals, scores_of
from lewis.evaluation.statistics.scores import score_table
from lewis.evaluation.step import ModelScores, scored_models
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.inspection.step import InspectionInput, sizes_by_layer, sizes_by_tensor
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.registry import history, versions
from lewis.registry.lineage import by_reference, lineage_of
from lewis.registry.versions import Champion, Version
from lewis.reports import charts, tables
from lewis.reports.markdown import code, picture
from lewis.reports.page import PageFacts, to_html
from lewis.reports.run_report import RunFacts, changes, outcome, score_columns, to_markdown
from lewis.steps.graph import inspection_settings, warning_of_shared_set
from lewis.store import kinds
from lewis_tasks.support import flow_run
from lewis_tasks.support.assets import artifact_key
from lewis_tasks.support.caching import RETRIES

S = TypeVar("S")


@task(name="report-densities", task_run_name="report densities", cache_policy=NO_CACHE, timeout_seconds=600)
def report_densities(recipe: Recipe, measured: list[list[ImportanceEntry]], allocated: AllocationEntry) -> None:
    """Publish the density heat map as an artifact, and the importance table if importance was measured."""
    means = ", ".join(f"{code(ref)}: {mean:.3f}" for ref, mean in allocated.means.items())
    drawn = picture("densities", charts.densities(allocated))
    create_markdown_artifact(
        f"# Density per layer\n\nMean over the covered weights: {means}\n\n{drawn}",
        key=artifact_key(recipe, "density-heat-map"),
        description="Fraction of each task vector that is kept",
    )
    if measured:
        create_table_artifact(
            tables.importance_rows(list(chain.from_iterable(measured)), allocated),
            key=artifact_key(recipe, "importance-table"),
            description="Activation-weighted norm of every covered layer, and how far the experts moved",
        )


@task(name="report-scores", task_run_name="report scores", cache_policy=NO_CACHE, timeout_seconds=600)
def report_scores(recipe: Recipe, scores: dict[str, ModelScores]) -> dict[str, list[dict[str, str]]]:
    """Publish scores, comparison by document, kept share of the experts' gains, and a picture as artifacts.

    Returns:
        the rows of the tables `scores`, `comparison` and `kept`.
    """
    models = scored_models(recipe.score_weights, scores)
    found = {
        "scores": score_table(scores_of(models)),
        "comparison": comparison_rows(models),
        "kept": kept_rows(kept_gains(recipe.gate_metric, models)),
    }
    shown = {
        "score-table": (found["scores"], "Scores next to the parents'"),
        "comparison": (found["comparison"], "The merged model against each other one, document by document"),
    }
    if found["kept"]:
        shown["kept"] = found["kept"], "How much of each expert's gain over the base is kept on its own task"
    for what, (rows, about) in shown.items():
        create_table_artifact(rows, key=artifact_key(recipe, what), description=about)
    create_markdown_artifact(
        f"# Scores\n\n{picture('scores', charts.scores(recipe.score_weights, scores))}",
        key=artifact_key(recipe, "score-bars"),
        description="Scores with 95 % intervals",
    )
    return found


@task(name="report-run", task_run_name="report run", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def report_run(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: list[ModelFiles],
    calibrations: list[CalibrationEntry],
    allocated: AllocationEntry | None,
    merged: MergedModel,
    champion: Champion | None,
    scores: dict[str, ModelScores],
    verdict: Verdict | None,
    version: Version | None,
    work: dict[str, tuple[int, int]],
    comparison: list[dict[str, str]],
    published: str | None,
) -> str:
    """Write the report of a run: an artifact in the UI, a page in the store, and both to a new version's MLflow run.

    Args:
        champion: the version in use when the run began.
        work: step -> (how many results were computed, how many were found in the cache).
        comparison: rows from `report_scores`.
        published: URL of the champion on the Hub.

    Returns:
        the path of the page.
    """
    run = flow_run.this_run()
    links = {flow_run.url_text(): flow_run.url()}
    pages = versions.run_pages(version) if version else None
    if version:
        links["MLflow version"] = versions.page(version.name, version.version)
    if version and pages:
        links |= {"MLflow run": versions.run_link(version), "MLflow charts of all versions": pages[1]}
    if published:
        links["Hub"] = published
    inputs, in_use = lineage_of(base, experts, calibrations), champion.version.uri if champion else None
    earlier = champion.metrics if champion and champion.digest != merged.digest else None
    models = scored_models(recipe.score_weights, scores)
    moved = _sizes(sizes_by_layer, recipe, base, experts) if verdict and not verdict.passed else None
    facts = RunFacts(
        recipe=recipe.name,
        outcome=outcome(version.uri if version else None, verdict, in_use, created=bool(version and version.created)),
        why=flow_run.why(run),
        seconds=(datetime.now(UTC) - run.start_time).total_seconds() if run.start_time else 0,
        digest=merged.digest,
        champion=in_use,
        changes=changes(by_reference(champion.sources, inputs) if champion else {}, inputs),
        work=work,
        scores=score_columns(models, earlier),
        comparison=comparison,
        kept=kept_rows(kept_gains(recipe.gate_metric, models)),
        pictures=_pictures(recipe, allocated, scores) | (_over_versions(version) if version else {}),
        verdict=verdict,
        documents=side_by_side(recipe.gate_metric, models),
        layers=() if moved is None else tables.moved_rows(moved, allocated),
        means=allocated.means if allocated else {},
        fit=merged.fit,
        warning=warning_of_shared_set(recipe),
        links=links,
        adapter=merged.adapter.to_text() if merged.adapter else "",
    )
    page = kinds.REPORTS.path(f"{recipe.name}_{run.id}")
    sizes = _sizes(sizes_by_tensor, recipe, base, experts)
    about = PageFacts(
        {each.ref: "expert" for each in experts} | ({base.ref: "base"} if base else {}),
        sizes,
        {ref: dict(each.densities) for ref, each in allocated.experts().items()} if allocated else {},
        flow_run.step_times(run),
        intervals(models) if models else {},
        recipe.public_text,
    )
    text, html = to_markdown(facts), to_html(facts, about)
    store.write_text(page, html)
    # Artifacts of the run, not of this task: its page shows them above those of the tasks.
    shown = {"run-report": ("markdown", text, facts.outcome)}
    if version and version.created:
        versions.attach(version, {"run_report.md": text, versions.PAGE: html})
    if pages:
        text = f"[the run with pictures]({pages[0]}); here: `lewis report {quote(recipe.name)} --open`"
        shown["report-page"] = ("markdown", text, "The run as a page")
    with get_client(sync_client=True) as client:
        for what, (kind, data, said) in shown.items():
            key = artifact_key(recipe, what)
            client.create_artifact(ArtifactCreate(key=key, type=kind, description=said, data=data, flow_run_id=run.id))
    return str(page)


def _pictures(recipe: Recipe, allocated: AllocationEntry | None, scores: dict[str, ModelScores]) -> dict[str, bytes]:
    found = {"Scores with 95 % intervals": charts.scores(recipe.score_weights, scores)} if scores else {}
    return found | ({"Density per layer": charts.densities(allocated)} if allocated else {})


def _over_versions(version: Version) -> dict[str, bytes]:
    """Return the chart of the champion's score over the versions, by title; empty with one version, or no score."""
    try:
        return {"The champion over the versions": history.picture(version.name)} if int(version.version) > 1 else {}
    except InputError:  # the recipe scores nothing
        return {}


def _sizes(
    read: Callable[[InspectionInput], dict[str, S]], recipe: Recipe, base: ModelFiles | None, experts: list[ModelFiles]
) -> dict[str, S]:
    """Return how far each expert moved, as `read` measures it; empty without inspection, or if model files are gone."""
    if recipe.inspect.on == "off":
        return {}
    try:
        return read(InspectionInput(base, tuple(experts), inspection_settings(recipe)))
    except InputError:
        return {}
