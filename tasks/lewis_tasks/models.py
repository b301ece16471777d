"""The models of a recipe: pinned, checked before they are downloaded, and what their weights show of a bad fit."""

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
from lewis_tasks.support.caching import RETRIES

logger = logging.getLogger(__name__)


# Never cached: each run must ask again what a branch points to.
@task(name="resolve", task_run_name="resolve {short}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve(recipe: Recipe, ref: str, short: str, base: Source | None = None, first: Source | None = None) -> Source:
    """Pin one model, called `short`; `base` is that of an adapter that names none, `first` has the tensors' names."""
    return source.pin(ref, recipe.root, base, first)


@task(name="resolve", task_run_name="resolve {short}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve_at(
    recipe: Recipe, ref: str, short: str, key: str, base: Source | None = None, first: Source | None = None
) -> Source:
    """Pin one model to the content that it had where, or when, the work began; the others are as for `resolve`."""
    return source.pin_at(ref, key, recipe.root, base, first)


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE, timeout_seconds=1800, **RETRIES)
def preflight(recipe: Recipe, base: Source | None, experts: list[Source]) -> None:
    """Refuse models that do not fit together, before they are downloaded, and show what their configs say."""
    for renamed in compatible.preflight(recipe, base, experts, network=True, needed=recipe.needs_network):
        logger.info(renamed)
    settings = inspection_settings(recipe)
    findings = before_download(base, experts, settings) if recipe.inspect.on != "off" else []
    for finding in findings:
        logger.warning(finding.to_text())
    check_findings(findings, settings)


def show_inspection(given: InspectionInput, prefix: str) -> None:
    """The findings on the models of a merge, with tables and a picture, as an artifact; warnings go to the log.

    Raises:
        BrokenModelError, InputError: if one is an error, and the recipe does not want to merge all the same.
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
    """A row with the models' names, which its first cell has, as code."""
    first = next(iter(row))
    return {**row, first: markdown.code(str(row[first]))}
