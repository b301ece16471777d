"""Resolve model references to pinned commits."""

import logging
import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from lewis.models import source as models
from lewis.models.source import Source
from lewis.recipe.recipe import Recipe
from lewis_tasks.support.caching import RETRIES

logger = logging.getLogger(__name__)
POLL = 2.0  # seconds
PATIENCE = 20  # times `seconds`; a repo that still moves is merged then all the same


# Never cached: each run must ask again what a branch points to.
@task(name="resolve", task_run_name="resolve {short}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve(recipe: Recipe, ref: str, short: str, base: Source | None = None, first: Source | None = None) -> Source:
    """Pin one model, called `short`; `base` is that of an adapter that names none, `first` has the tensors' names."""
    return models.pin(ref, recipe.root, base, first)


@task(name="resolve", task_run_name="resolve {short}", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def resolve_at(recipe: Recipe, ref: str, short: str, key: str, base: Source | None = None) -> Source:
    """Pin one model to the content that another machine has pinned; `short` and `base` as for `resolve`."""
    return models.pin_at(ref, key, recipe.root, base)


@task(name="settle", task_run_name="settle", cache_policy=NO_CACHE, timeout_seconds=3600, **RETRIES)
def settle(recipe: Recipe, seconds: float) -> None:
    """Wait until no model of the recipe has moved for `seconds`, so that a burst of releases is merged once."""
    seen, began = None, time.monotonic()
    quiet_since = began
    while time.monotonic() - quiet_since < seconds and time.monotonic() - began < PATIENCE * seconds:
        base, experts = models.pin_all(recipe)
        heads = [source.key for source in ([base] if base else []) + experts]
        if heads != seen:
            seen, quiet_since = heads, time.monotonic()
            logger.info("%s: the models rest for %g s before the work begins", recipe.name, seconds)
        time.sleep(min(POLL, seconds))
