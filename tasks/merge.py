"""Write a merged checkpoint."""

from typing import Literal

from prefect.assets import materialize
from prefect.tasks import MaterializingTask

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.devices import merge_device
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.merging import step
from lewis.merging.prepared import FIT_SEMANTICS, SEMANTICS, STATIC_SEMANTICS
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis_tasks.support import assets
from lewis_tasks.support.caching import Progress, cached
from lewis_tasks.support.device_slot import device_slot


@materialize(
    "lewis://merged/of-a-recipe",  # `merging` puts the real name in its place
    by="lewis",
    name="merge",
    task_run_name="merge {which}",
    timeout_seconds=6 * 3600,
    **cached(
        *("blocks", "base", "experts", "allocated", "which", "calibrations", "measured"),
        version=f"{SEMANTICS}.{FIT_SEMANTICS}.{STATIC_SEMANTICS}",
        device_of=merge_device,
    ),
)
def merge(
    recipe: Recipe,
    blocks: str,
    base: ModelFiles | None,
    experts: list[ModelFiles],
    allocated: AllocationEntry | None,
    which: Literal["experts", "uniform"] = "experts",
    calibrations: list[CalibrationEntry] | None = None,
    measured: list[list[ImportanceEntry]] | None = None,
) -> MergedModel:
    """Merge with the densities of the `experts`, or of the `uniform` baseline.

    Ends as `Cached` if the store has it.

    `blocks`, and the `calibrations` and what was `measured` on them that a method fits to, are for the cache key.
    """
    report = Progress(f"merge-{which}", f"merge {recipe.name} ({which})")
    with device_slot() as slot, store.noticing() as written:
        made = step.merge(
            recipe, base, experts, allocated, which, progress=lambda _, done, total: report(done / total), gpu=slot
        )
    inputs = {files.ref: files.key for files in [*([base] if base else []), *experts]}
    assets.describe(digest=made.digest, inputs=inputs, mean_density=dict(allocated.means) if allocated else {})
    return assets.made_or_found(made, made.folder, f"the merge of the {which}", written)


def merging(recipe: Recipe, which: str = "experts") -> MaterializingTask[..., MergedModel]:
    """The task `merge` with the assets of one recipe: Prefect shows the lineage from its models to the merged one."""
    return merge.with_options(assets=[assets.merged(recipe, which)], asset_deps=[*assets.parents(recipe)])
