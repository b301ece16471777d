"""Artifacts for the Prefect UI, with stable keys: pictures and tables of densities, importance and scores."""

import base64
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from lewis import report
from lewis.entries import AllocationEntry, ImportanceEntry, ScoresEntry
from lewis.evaluation import score_table
from lewis.recipe import Recipe
from tasks.caching import slug


@task(name="report-densities", cache_policy=NO_CACHE, timeout_seconds=600)
def report_densities(recipe: Recipe, measured: list[ImportanceEntry], allocated: AllocationEntry) -> None:
    """The density heat map and the importance table."""
    experts = allocated.experts()
    picture = report.density_heat_map({ref: each.densities for ref, each in experts.items()}, allocated.means)
    means = ", ".join(f"{ref}: {mean:.3f}" for ref, mean in allocated.means.items())
    create_markdown_artifact(
        f"# Density per layer\n\nMean over the covered weights: {means}\n\n{as_markdown('densities', picture)}",
        key=f"{slug(recipe.name)}-density-heat-map",
        description="Fraction of each task vector that is kept",
    )
    if measured:
        create_table_artifact(
            importance_rows(measured, allocated),
            key=f"{slug(recipe.name)}-importance-table",
            description="Activation-weighted norm of every covered layer, and how far the experts moved",
        )


@task(name="report-scores", cache_policy=NO_CACHE, timeout_seconds=600)
def report_scores(recipe: Recipe, scores: dict[str, ScoresEntry]) -> list[dict[str, Any]]:
    """The score table and its picture; gives the table's rows."""
    found = {label: entry.scores for label, entry in scores.items()}
    rows = score_table(found)
    create_table_artifact(rows, key=f"{slug(recipe.name)}-score-table", description="Scores beside the parents'")
    create_markdown_artifact(
        f"# Scores\n\n{as_markdown('scores', report.score_bars(found))}",
        key=f"{slug(recipe.name)}-score-bars",
        description="Scores with standard errors",
    )
    return rows


def importance_rows(measured: list[ImportanceEntry], allocated: AllocationEntry) -> list[dict[str, Any]]:
    """One row per covered layer: the norm in each model, then difference and density of each expert."""
    norms = {f"{entry.ref} on {entry.calibration}": entry.norms for entry in measured}
    experts, rows = allocated.experts(), []
    for tensor in next(iter(norms.values())):
        row: dict[str, Any] = {"layer": tensor.removesuffix(".weight")}
        row |= {name: float(f"{values[tensor]:.6g}") for name, values in norms.items()}
        for ref, each in experts.items():
            row |= {f"D {ref}": float(f"{each.differences[tensor]:.4g}")} if each.differences else {}
            row |= {f"density {ref}": round(each.densities[tensor], 4)}
        rows.append(row)
    return rows


def as_markdown(name: str, png: bytes) -> str:
    """A picture inside Markdown, so that the UI needs no file."""
    return f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})"
