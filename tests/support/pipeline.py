"""The steps one by one with a recipe in hand, as tests and benchmarks want them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lewis.allocation.step import AllocationEntry
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import find_scores, score
from lewis.importance import step as importance
from lewis.importance.step import CalibrationEntry, CalibrationInput, ImportanceEntry, MeasureInput, layers_of
from lewis.merging import step as merging
from lewis.merging.run import Merge
from lewis.merging.step import MergedModel, MergeInput, find_merged
from lewis.models.compatible import preflight
from lewis.models.source import ModelFiles, download, pin, pin_all, short_names
from lewis.progress import silent
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Importance
from lewis.steps.graph import graph
from lewis.steps.run import run
from lewis.steps.table import ALLOCATE, CALIBRATE, CONTINUE, DOWNLOAD, MEASURE

__all__ = [
    "download", "eval_settings", "fetch", "find_merged", "find_scores", "guide", "layers_of", "measure", "merge", "pin",
    "pin_all", "preflight", "prepare_calibration", "prepare_merge", "score", "short_names",
]  # fmt: skip


def fetch(recipe: Recipe) -> tuple[ModelFiles | None, list[ModelFiles]]:
    """Base and experts on this disk."""
    base, experts = pin_all(recipe)
    preflight(recipe, base, experts)
    return download(base) if base else None, [download(source) for source in experts]


def known(recipe: Recipe, base: ModelFiles | None, experts: Sequence[ModelFiles]) -> dict[str, Any]:
    """The results of a graph's first nodes."""
    named = zip([entry.model for entry in recipe.experts], experts, strict=True)
    found = {f"{DOWNLOAD.name} {ref}": files for ref, files in named}
    return {**found, **({f"{DOWNLOAD.name} {recipe.base_model}": base} if base else {}), "inspect": 0}


def guide(
    recipe: Recipe,
    base: ModelFiles,
    experts: Sequence[ModelFiles],
    *,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[ImportanceEntry], AllocationEntry | None]:
    """What is measured, and the densities."""
    walked = graph(recipe)
    names = [node.name for step in (MEASURE, ALLOCATE) for node in walked.of(step)]
    results = run(walked, *names, known=known(recipe, base, experts), report=progress or silent, device=device)
    return [each for node in walked.of(MEASURE) for each in results[node.name]], results.get(ALLOCATE.name)


def prepare_calibration(recipe: Recipe, name: str, base: ModelFiles) -> CalibrationEntry:
    """One calibration set of a recipe."""
    assert recipe.lewis is not None
    return importance.prepare_calibration(CalibrationInput(name, recipe.lewis.calibrations[name], recipe.root, base))


def measure(
    files: ModelFiles,
    sets: Sequence[CalibrationEntry],
    settings: Importance | None = None,
    *,
    grams: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[ImportanceEntry]:
    """The importance of one model."""
    given = MeasureInput(files, tuple(sets), settings or Importance(), grams)
    return importance.measure(given, (lambda _, done, total: progress(done, total)) if progress else silent, device)


def merge_input(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None = None,
    which: str = "experts",
) -> MergeInput:
    """The input of the step `merge`."""
    walked, results = graph(recipe), known(recipe, base, experts)
    results = run(
        walked, *(node.name for step in (CALIBRATE, CONTINUE) for node in walked.of(step) if recipe.fits), known=results
    )
    if which == "uniform" and "merge uniform" not in walked:
        given: MergeInput = walked["merge experts"].given({**results, ALLOCATE.name: allocated})
        return MergeInput(**{**vars(given), "which": which})
    return walked[f"merge {which}"].given({**results, ALLOCATE.name: allocated})


def prepare_merge(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None = None,
    which: str = "experts",
    gpu: str = "cuda",
) -> Merge:
    """A merge that can be run."""
    return merging.prepare_merge(merge_input(recipe, base, experts, allocated, which), gpu)


def merge(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    allocated: AllocationEntry | None = None,
    which: str = "experts",
    **arguments: Any,
) -> MergedModel:
    """The merged model in the store."""
    return merging.merge(merge_input(recipe, base, experts, allocated, which), **arguments)


def eval_settings(recipe: Recipe, root: Path | None = None) -> EvalSettings:
    """The settings of a recipe's evaluation."""
    assert recipe.evaluate is not None
    return EvalSettings.of(recipe.evaluate, root or recipe.root)
