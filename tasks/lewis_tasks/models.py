"""Prefect tasks for the models of a recipe: pin them, check them before the download, show what an inspection finds."""

import logging
from collections.abc import Mapping

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from lewis.inspection import result
from lewis.inspection.step import InspectionInput, before_download, check, check_findings, inspect
from lewis.models import compatible, source
from lewis.models.source import Source
from lewis.recipe.recipe import Recipe
from lewis.reports import markdown
from lewis.steps.graph import inspection_settings
from lewis.steps.run import check_scored
from lewis_tasks.support.caching import RETRIES

logger = logging.getLogger(__name__)


# Never cached: each run must ask again what a branch points to.
@task(name="resolve", task_run_name="resolve {short}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve(recipe: Recipe, ref: str, short: str, base: Source | None = None, first: Source | None = None) -> Source:
    """Pin a model of a recipe to commits; `short` names the task run, the rest is as for `source.pin`."""
    return source.pin(ref, recipe.root, base, first)


@task(name="resolve", task_run_name="resolve {short}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve_at(
    recipe: Recipe, ref: str, short: str, key: str, base: Source | None = None, first: Source | None = None
) -> Source:
    """Pin a model to the content `key` that it had where, or when, the work began; see `source.pin_at`."""
    return source.pin_at(ref, key, recipe.root, base, first)


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE, timeout_seconds=1800, **RETRIES)
def preflight(recipe: Recipe, base: Source | None, experts: list[Source]) -> None:
    """Check before the download that models fit and can be scored; log what an inspection of their configs finds."""
    for renamed in compatible.preflight(recipe, base, experts, needed=recipe.needs_network):
        logger.info(renamed)
    check_scored(recipe, base, experts)
    settings = inspection_settings(recipe)
    findings = before_download(base, experts, settings) if recipe.inspect.on != "off" else []
    for finding in findings:
        logger.warning(finding.to_text())
    check_findings(findings, settings)


def show_inspection(given: InspectionInput, prefix: str) -> None:
    """Publish the inspection of a merge's models as an artifact: findings, tables, a picture; log its verdict.

    Raises:
        BrokenModelError, InputError: if a finding is an error, unless the recipe says to merge nevertheless.
    """
    found = inspect(given)
    (logger.warning if found.findings else logger.info)("%s", found.verdict)
    tables = [[_shown(row) for row in rows] for rows in (found.rows, found.pairs) if rows]
    grids = "\n\n".join(map(markdown.markdown_table, tables))
    drawn = markdown.picture("layers by experts", result.draw(found))
    create_markdown_artifact(
        f"# Do these models belong together?\n\n{found.to_markdown()}\n\n{grids}\n\n{drawn}",
        key=f"{prefix}-inspection",
        description=found.verdict,
    )
    check(found, given)


def _shown(row: Mapping[str, object]) -> dict[str, object]:
    """Return a row of a table with its first cell, which names the models, formatted as code."""
    first = next(iter(row))
    return {**row, first: markdown.code(str(row[first]))}
