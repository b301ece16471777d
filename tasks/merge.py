"""Write a merged checkpoint."""

from typing import Literal

from prefect import task

from lewis import merge as library
from lewis import pipeline
from lewis.entries import AllocationEntry, MergedModel, ModelFiles
from lewis.recipe import Recipe
from tasks.caching import Progress, cached, device_slot


@task(
    name="merge",
    task_run_name="merge {which}",
    timeout_seconds=6 * 3600,
    **cached("blocks", "base", "experts", "allocated", "which", version=library.SEMANTICS),
)
def merge(
    recipe: Recipe,
    blocks: str,
    base: ModelFiles | None,
    experts: list[ModelFiles],
    allocated: AllocationEntry | None,
    which: Literal["experts", "uniform"] = "experts",
) -> MergedModel:
    """Merge with the densities of the `experts`, or of the `uniform` baseline; `blocks` is for the cache key."""
    report = Progress(f"merge-{which}", f"merge {recipe.name} ({which})")
    with device_slot():
        return pipeline.merge(
            recipe, base, experts, allocated, which, progress=lambda done, total, name: report(done / total)
        )
