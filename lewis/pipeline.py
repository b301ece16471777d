"""The whole merge for a notebook: `guide`, and the steps of the wings by their names.

Each step finds its entry in the store by content, or makes it once, under a lock. The Prefect tasks and the
command line call the same functions, so that they find each other's entries.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from lewis.allocation.step import AllocationEntry, AllocationInput, ExpertInput, allocate, find_allocated
from lewis.evaluation.step import ScoresEntry, eval_settings, find_scores, score, scored
from lewis.importance.step import (
    CalibrationEntry,
    ImportanceEntry,
    find_measured,
    layers_of,
    measure,
    prepare_calibration,
    wanted_measurements,
)
from lewis.merging.step import MergedModel, find_merged, lineage, merge, prepare_merge
from lewis.models.compatible import preflight
from lewis.models.source import ModelFiles, Source, download, pin, pin_all, short_names
from lewis.recipe.recipe import Recipe

__all__ = [
    "AllocationEntry", "CalibrationEntry", "ImportanceEntry", "MergedModel", "ModelFiles", "ScoresEntry", "Source",
    "allocate", "allocation_input", "download", "eval_settings", "fetch", "find_allocated", "find_measured",
    "find_merged", "find_scores", "guide", "layers_of", "lineage", "measure", "merge", "pin", "pin_all", "preflight",
    "prepare_calibration", "prepare_merge", "score", "scored", "short_names", "wanted_measurements",
]  # fmt: skip


def fetch(recipe: Recipe) -> tuple[ModelFiles | None, list[ModelFiles]]:
    """Pin base and experts, check from their headers that they fit together, and bring them to the disk.

    Returns:
        The base, None if the recipe has none, and the experts in the recipe's order.

    Raises:
        InputError: naming what does not exist or does not fit, before anything is downloaded.
        TransientError: if the Hub cannot be asked right now; trying again can help.
    """
    base, experts = pin_all(recipe)
    preflight(recipe, base, experts)
    return download(base) if base else None, [download(source) for source in experts]


def guide(
    recipe: Recipe,
    base: ModelFiles,
    experts: Sequence[ModelFiles],
    *,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[ImportanceEntry], AllocationEntry | None]:
    """Calibrate, measure and allocate, one after another: the library's way, without Prefect.

    Args:
        progress: called with (model, tokens done, tokens in all).

    Returns:
        What was measured, and the densities: nothing and None for a plain merge. For a method that fits there are no
        densities; what was measured are the statistics that it fits to, if it needs any.
    """
    if recipe.lewis is None:
        return [], None
    of_entry: Mapping[str, ModelFiles] = {e.model: f for e, f in zip(recipe.experts, experts, strict=True)}
    sets: dict[str, CalibrationEntry] = {}
    measured = []
    for entry, names in wanted_measurements(recipe):
        files = base if entry is None else of_entry[entry.model]
        sets |= {name: prepare_calibration(recipe, name, base) for name in names if name not in sets}
        report = None if progress is None else _labelled(progress, f"{files.ref} on {', '.join(names)}")
        own = [sets[name] for name in names]
        grams = recipe.needs_grams and entry is not None
        measured += measure(files, own, recipe.lewis.importance, grams=grams, device=device, progress=report)
    return measured, allocate(allocation_input(recipe, base, experts, measured)) if recipe.allocator else None


def allocation_input(
    recipe: Recipe, base: ModelFiles, experts: Sequence[ModelFiles], measured: Iterable[ImportanceEntry]
) -> AllocationInput:
    """What decides the densities of a recipe with a `lewis` block.

    Args:
        experts: in the order of `recipe.experts`.
        measured: importance of base and experts on the sets that they need.
    """
    block = recipe.lewis
    assert block is not None
    return AllocationInput(
        density=block.density,
        metric=block.importance.metric,
        prune_by=block.prune_by,
        aim=block.aim is not None,
        config=recipe.config,
        base=base,
        experts=tuple(
            ExpertInput(entry.model, files, recipe.calibration_of(entry) if recipe.measures else None)
            for entry, files in zip(recipe.experts, experts, strict=True)
        ),
        measured=tuple(measured),
        runs_models=recipe.runs_models,
    )


def _labelled(progress: Callable[[str, int, int], None], label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(label, done, total)
