"""From importance to densities."""

from itertools import chain

from prefect import task

from lewis import store
from lewis.allocation import densities, step
from lewis.allocation.step import AllocationEntry
from lewis.importance.step import ImportanceEntry
from lewis.models.source import ModelFiles
from lewis.pipeline import allocation_input
from lewis.recipe.recipe import Recipe
from lewis_tasks.support import assets
from lewis_tasks.support.caching import cached


@task(
    name="allocate",
    task_run_name="allocate",
    timeout_seconds=1800,
    **cached("blocks", "base", "experts", "measured", version=densities.SEMANTICS),
)
def allocate(
    recipe: Recipe, blocks: str, base: ModelFiles, experts: list[ModelFiles], measured: list[list[ImportanceEntry]]
) -> AllocationEntry:
    """Allocate a density to every tensor of every expert; ends as `Cached` if the store has them.

    Args:
        blocks: the recipe's `blocks`, for the cache key.
        measured: importance of each measured model on its calibration sets.
    """
    with store.noticing() as made:
        entry = step.allocate(allocation_input(recipe, base, experts, chain.from_iterable(measured)))
    return assets.made_or_found(entry, entry.path, "the densities", made)
