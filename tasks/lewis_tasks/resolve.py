"""Resolve model references to pinned commits."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from lewis.models import source as models
from lewis.models.source import Source
from lewis.recipe.recipe import Recipe
from lewis_tasks.support.caching import RETRIES


# Never cached: each run must ask again what a branch points to.
@task(name="resolve", task_run_name="resolve {ref}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve(recipe: Recipe, ref: str, base: Source | None = None, first: Source | None = None) -> Source:
    """Pin one model; `base` is that of an adapter that names none, `first` gives the names of tensors."""
    return models.pin(ref, recipe.root, base, first)


@task(name="resolve", task_run_name="resolve {ref}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve_at(recipe: Recipe, ref: str, key: str, base: Source | None = None) -> Source:
    """Pin one model to the content that another machine has pinned; `base` as for `resolve`."""
    return models.pin_at(ref, key, recipe.root, base)
