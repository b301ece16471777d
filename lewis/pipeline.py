"""The whole merge for a notebook: `guide`, and the steps of the wings by their names.

Each step finds its entry in the store by content, or makes it once, under a lock. The Prefect tasks and the
command line call the same functions, so that they find each other's entries.
"""

from collections.abc import Callable, Mapping, Sequence

from lewis.allocation.step import AllocationEntry, allocate, find_allocated
from lewis.errors import InputError, RecipeError
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
from lewis.inspection.kinds import Finding
from lewis.inspection.result import Inspection
from lewis.inspection.step import InspectionSettings, before_download, inspect
from lewis.merging.resolved import stored_dtype
from lewis.merging.step import MergedModel, find_merged, lineage, merge, prepare_merge
from lewis.methods import find
from lewis.models.compatible import preflight
from lewis.models.source import ModelFiles, Source, download, pin, pin_all, short_names
from lewis.progress import Report, silent
from lewis.recipe.recipe import Recipe

__all__ = [
    "AllocationEntry", "CalibrationEntry", "ImportanceEntry", "MergedModel", "ModelFiles", "ScoresEntry", "Source",
    "allocate", "download", "eval_settings", "fetch", "find_allocated", "find_measured", "find_merged", "find_scores",
    "guide", "inspect_recipe", "layers_of", "lineage", "measure", "merge", "pin", "pin_all", "preflight",
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


def inspect_recipe(recipe: Recipe, bases: Sequence[str] = (), report: Report = silent) -> Inspection:
    """Fetch the models of a recipe and inspect them; what does not fit is a finding, and is not downloaded.

    Args:
        bases: references of other models that may be an expert's base.
        report: called with ("inspect", elements read, elements in all).

    Raises:
        InputError: if a model does not exist, or the base is broken.
        TransientError: if the Hub cannot be asked right now; trying again can help.
    """
    base, experts = pin_all(recipe)
    others = [pin(ref, recipe.root) for ref in bases]
    first = base or experts[0]
    preflight(recipe, first, [])
    fitting, refused = [], []
    for source in experts if base else experts[1:]:
        try:
            preflight(recipe, first, [source])
            fitting.append(download(source))
        except RecipeError:
            raise
        except InputError as error:
            refused.append(Finding("no fit", source.ref, str(error)))
    settings, candidates = inspection_settings(recipe), [download(each) for each in others]
    known = [*refused, *before_download(base, experts, settings)]
    files = download(first)
    return inspect(
        files if base else None,
        fitting if base else [files, *fitting],
        settings,
        candidates,
        known=known,
        report=report,
    )


def inspection_settings(recipe: Recipe) -> InspectionSettings:
    """What an inspection has to know of a recipe's merge."""
    return InspectionSettings(
        base_is_a_model=find(recipe.merge_method).base_is_a_model,
        exclude=recipe.exclude,
        by_token=recipe.vocabulary is not None,
        sliced=bool(recipe.slices),
        dtype=stored_dtype(recipe),
    )


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
    return measured, allocate(recipe, base, experts, measured) if recipe.allocator else None


def _labelled(progress: Callable[[str, int, int], None], label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(label, done, total)
