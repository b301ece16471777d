"""Check the models before any work: whether they fit, what is covered, whether there is space; and diagnose them."""

import logging

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from lewis import pipeline, store
from lewis.importance.step import layers_of
from lewis.inspection import measures, result, step
from lewis.merging.step import check_output, prepare_merge
from lewis.models import compatible
from lewis.models.source import ModelFiles, Source
from lewis.recipe.recipe import Recipe
from lewis.reports import markdown
from lewis.store import kinds
from lewis_tasks.support.assets import artifact_key
from lewis_tasks.support.caching import RETRIES, Progress, cached
from lewis_tasks.support.room import make_room

logger = logging.getLogger(__name__)


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE, timeout_seconds=1800, **RETRIES)
def preflight(recipe: Recipe, base: Source | None, experts: list[Source]) -> None:
    """Refuse models that do not fit together, before they are downloaded, and tell what their configs show."""
    for told in compatible.preflight(recipe, base, experts):
        logger.info(told)
    for finding in step.before_download(base, experts, pipeline.inspection_settings(recipe)):
        logger.warning(finding.to_text())


@task(name="inspect", task_run_name="inspect", cache_policy=NO_CACHE, timeout_seconds=1800)
def inspect(recipe: Recipe, base: ModelFiles | None, experts: list[ModelFiles]) -> int:
    """Check what headers and configs tell, and the space; gives the number of covered layers, 0 for a plain merge."""
    prepared = prepare_merge(recipe, base, experts)
    check_output(recipe, prepared)
    needed = (1 + recipe.wants_uniform) * prepared.size
    make_room(needed)
    store.check_space(kinds.MERGED.folder, needed)
    if recipe.lewis is None or base is None:
        return 0
    return len(layers_of(base, measured=recipe.runs_models))


@task(
    name="diagnose",
    task_run_name="diagnose",
    timeout_seconds=3600,
    **cached("blocks", "base", "experts", version=measures.SEMANTICS),
)
def diagnose(recipe: Recipe, blocks: str, base: ModelFiles | None, experts: list[ModelFiles]) -> list[dict[str, str]]:
    """Find out whether the models belong together; the findings become an artifact and do not stop the run.

    Args:
        blocks: the recipe's `blocks`, for the cache key.

    Returns:
        The findings as plain data.
    """
    report = Progress("diagnose", f"read the weights of {recipe.name}'s models")
    settings = pipeline.inspection_settings(recipe)
    found = step.inspect(base, experts, settings, report=lambda _, done, total: report(done / max(total, 1)))
    (logger.warning if found.findings else logger.info)("%s: %s", recipe.name, found.verdict)
    tables = "\n\n".join(markdown.markdown_table(rows) for rows in (found.rows, found.pairs) if rows)
    drawn = markdown.picture("layers by experts", result.draw(found))
    create_markdown_artifact(
        f"# Do these models belong together?\n\n{found.to_markdown()}\n\n{tables}\n\n{drawn}",
        key=artifact_key(recipe, "inspection"),
        description=found.verdict,
    )
    return [each.to_json() for each in found.findings]
