"""Resolve a model reference to a pinned commit."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from lewis import pipeline
from lewis.entries import Source
from lewis.recipe import Recipe
from tasks.caching import RETRIES


# Never cached: what a branch points to is the one thing that must be asked anew.
@task(name="resolve", task_run_name="resolve {ref}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve(recipe: Recipe, ref: str, base: Source | None = None) -> Source:
    """Pin one model; `base` is what an adapter without a base of its own sits on."""
    return pipeline.pin(ref, recipe.root, base)
