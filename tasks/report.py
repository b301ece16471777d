"""Artifacts for the Prefect UI, with stable keys: pictures and tables of densities and scores, the run's report."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from lewis.allocation.step import AllocationEntry
from lewis.evaluation.gate import Verdict
from lewis.evaluation.scored import comparison_rows, scores_of
from lewis.evaluation.scores import Score, score_table
from lewis.evaluation.step import ScoresEntry, scored
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.merge.step import MergedModel
from lewis.models.source import ModelFiles, Source
from lewis.recipe.recipe import Recipe
from lewis.registry import versions
from lewis.registry.registration import lineage_of
from lewis.registry.versions import Champion, Version
from lewis.reports import pictures
from lewis.reports.run_report import RunFacts, changes, picture, to_markdown
from lewis_tasks.support import flow_run
from lewis_tasks.support.caching import RETRIES, slug


@task(name="report-densities", cache_policy=NO_CACHE, timeout_seconds=600)
def report_densities(recipe: Recipe, measured: list[list[ImportanceEntry]], allocated: AllocationEntry) -> None:
    """The density heat map and the importance table."""
    means = ", ".join(f"{ref}: {mean:.3f}" for ref, mean in allocated.means.items())
    drawn = picture("densities", pictures.densities(allocated))
    create_markdown_artifact(
        f"# Density per layer\n\nMean over the covered weights: {means}\n\n{drawn}",
        key=f"{slug(recipe.name)}-density-heat-map",
        description="Fraction of each task vector that is kept",
    )
    if measured:
        create_table_artifact(
            importance_rows(list(chain.from_iterable(measured)), allocated),
            key=f"{slug(recipe.name)}-importance-table",
            description="Activation-weighted norm of every covered layer, and how far the experts moved",
        )


@task(name="report-scores", cache_policy=NO_CACHE, timeout_seconds=600)
def report_scores(recipe: Recipe, scores: dict[str, ScoresEntry]) -> dict[str, list[dict[str, str]]]:
    """The score table, the comparison document by document, and their picture; gives the rows of both."""
    models = scored(recipe, scores)
    tables = {"scores": score_table(scores_of(models)), "comparison": comparison_rows(models)}
    create_table_artifact(
        tables["scores"], key=f"{slug(recipe.name)}-score-table", description="Scores beside the parents'"
    )
    create_table_artifact(
        tables["comparison"],
        key=f"{slug(recipe.name)}-comparison",
        description="The merged model against each other one, document by document",
    )
    create_markdown_artifact(
        f"# Scores\n\n{picture('scores', pictures.scores(recipe, scores))}",
        key=f"{slug(recipe.name)}-score-bars",
        description="Scores with 95 % intervals",
    )
    return tables


@task(name="name-run", cache_policy=NO_CACHE, timeout_seconds=60)
def name_run(recipe: Recipe, base: Source | None, experts: list[Source]) -> None:
    """Name the flow run by the commits that it merges; its report adds the digest."""
    flow_run.rename(flow_run.run_name(recipe.name, [source.key for source in _models(base, experts)]))


@task(name="report-run", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def report_run(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: list[ModelFiles],
    calibrations: list[CalibrationEntry],
    allocated: AllocationEntry | None,
    merged: MergedModel,
    champion: Champion | None,
    scores: dict[str, ScoresEntry],
    verdict: Verdict | None,
    version: Version | None,
    work: dict[str, tuple[int, int]],
    comparison: list[dict[str, str]],
    published: str | None,
) -> str:
    """The story of the run, in the UI and beside the version in MLflow; gives it as Markdown.

    Args:
        champion: the version in use when the run began.
        work: as `provenance.tally` counts it.
        comparison: as `report_scores` gave it.
        published: where the champion is on the Hub.
    """
    flow_run.rename(flow_run.run_name(recipe.name, [f.key for f in _models(base, experts)], merged.digest))
    run = flow_run.this_run()
    links = {"Prefect run": flow_run.url()}
    if version:
        links |= {"MLflow version": versions.link(version), "MLflow run": versions.run_link(version)}
    if published:
        links["Hub"] = published
    facts = RunFacts(
        recipe=recipe.name,
        outcome=_outcome(champion, verdict, version),
        why=flow_run.why(run),
        seconds=(datetime.now(UTC) - run.start_time).total_seconds() if run.start_time else 0,
        digest=merged.digest,
        champion=champion.version.uri if champion else None,
        changes=changes(champion.sources if champion else {}, lineage_of(base, experts, calibrations)),
        work=work,
        scores=_columns(recipe, champion, merged, scores),
        merged=recipe.label,
        comparison=comparison,
        pictures=_pictures(recipe, allocated, scores),
        verdict=verdict,
        means=allocated.means if allocated else {},
        links=links,
    )
    text = to_markdown(facts)
    create_markdown_artifact(text, key=f"{slug(recipe.name)}-run-report", description=facts.outcome)
    if version and version.created:
        versions.attach(version, {"run_report.md": text})
    return text


def _models(base: Any, experts: list[Any]) -> list[Any]:
    return [*([base] if base else []), *experts]


def _outcome(champion: Champion | None, verdict: Verdict | None, version: Version | None) -> str:
    if version is None or verdict is None:
        return "Merged; the recipe registers nothing."
    new = "" if version.created else ", registered by an earlier run,"
    if champion and champion.version.uri == version.uri:
        return f"{version.uri} is the champion already; nothing to promote."
    if verdict.passed:
        return f"{version.uri}{new} is the new champion."
    return f"{version.uri}{new} was not promoted; " + (f"{champion.version.uri} stays." if champion else "none is yet.")


def _pictures(recipe: Recipe, allocated: AllocationEntry | None, scores: dict[str, ScoresEntry]) -> dict[str, bytes]:
    found = {"Scores with 95 % intervals": pictures.scores(recipe, scores)} if scores else {}
    if allocated:
        found["Density per layer"] = pictures.densities(allocated)
    return found


def _columns(
    recipe: Recipe, champion: Champion | None, merged: MergedModel, scores: dict[str, ScoresEntry]
) -> dict[str, list[Score]]:
    """Scores by label, the merged model's last; a champion that was not scored again has those of its version."""
    found = {model.label: list(model.scores) for model in scored(recipe, scores)}
    ours = found.pop(recipe.label, [])
    if champion and champion.digest != merged.digest and "champion" not in found:
        known = {s: champion.metrics.get(f"{s.task}/{s.metric}") for s in ours}
        found["champion"] = [replace(s, value=v, stderr=None) for s, v in known.items() if v is not None]
    return {label: each for label, each in {**found, recipe.label: ours}.items() if each}


def importance_rows(measured: list[ImportanceEntry], allocated: AllocationEntry) -> list[dict[str, Any]]:
    """One row per covered layer: the norm in each model, then difference and density of each expert."""
    norms = {f"{entry.ref} on {entry.calibration}": entry.norms for entry in measured}
    experts, rows = allocated.experts(), []
    moved = {ref for ref, each in experts.items() if len(set(each.differences.values())) > 1}
    for key in next(iter(norms.values())):
        tensor = key.partition("[")[0]  # of a part of a fused projection
        row: dict[str, Any] = {"layer": key.removesuffix(".weight")}
        row |= {name: _rounded(values[key], 6) for name, values in norms.items()}
        for ref, each in experts.items():
            row |= {f"D {ref}": _rounded(each.differences.get(key), 4)} if ref in moved else {}
            row |= {f"density {ref}": _rounded(each.densities.get(tensor), 4)}
        rows.append(row)
    return rows


def _rounded(value: float | None, digits: int) -> float | None:
    """None where no token reached a layer, or the recipe excludes it."""
    return None if value is None else float(f"{value:.{digits}g}")
