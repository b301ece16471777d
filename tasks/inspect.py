"""Check the models before any work: whether they fit together, what is covered, whether there is space."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from lewis import store
from lewis.importance.step import layers_of
from lewis.merge.step import check_output, prepare_merge
from lewis.models import compatible
from lewis.models.source import ModelFiles, Source
from lewis.recipe.recipe import Recipe
from lewis.store import kinds
from lewis_tasks.support.caching import RETRIES


@task(name="preflight", cache_policy=NO_CACHE, timeout_seconds=1800, **RETRIES)
def preflight(recipe: Recipe, base: Source | None, experts: list[Source]) -> None:
    """Refuse models that do not fit together, before they are downloaded."""
    compatible.preflight(recipe, base, experts)


@task(name="inspect", cache_policy=NO_CACHE, timeout_seconds=1800)
def inspect(recipe: Recipe, base: ModelFiles | None, experts: list[ModelFiles]) -> int:
    """Check what headers and configs tell, and the space; gives the number of covered layers, 0 for a plain merge."""
    prepared = prepare_merge(recipe, base, experts)
    check_output(recipe, prepared)
    store.check_space(kinds.MERGED.folder, (1 + recipe.wants_uniform) * prepared.size)
    if recipe.lewis is None or base is None:
        return 0
    return len(layers_of(base, measured=recipe.runs_models))
