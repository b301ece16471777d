"""Calibration sets and the importance of one model on them."""

from typing import Any

from prefect import task
from prefect.assets import materialize
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State
from prefect.tasks import MaterializingTask

from lewis.devices import default_device
from lewis.importance import gram_files, step
from lewis.importance import measure as library
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Importance
from lewis_tasks.support import assets
from lewis_tasks.support.caching import RETRIES, Progress, cached, computing_in
from lewis_tasks.support.device_slot import device_slot


# Not cached: it is cheap, and it gives the digest of the token ids, by which the passes are cached.
@task(name="calibrate", task_run_name="calibrate {name}", cache_policy=NO_CACHE, timeout_seconds=3600, **RETRIES)
def calibrate(recipe: Recipe, name: str, base: ModelFiles) -> CalibrationEntry:
    """Turn a calibration set into token ids."""
    return step.prepare_calibration(recipe, name, base)


def _what(files: ModelFiles, calibrations: list[CalibrationEntry]) -> str:
    return f"{files.ref} on {', '.join(each.name for each in calibrations)}"


def _run_name(parameters: dict[str, Any]) -> str:
    return f"measure {_what(parameters['files'], parameters['calibrations'])}"


@materialize(
    "lewis://importance/of-a-model",  # `measuring` puts the real name in its place
    by="lewis",
    name="measure",
    task_run_name=_run_name,  # type: ignore[arg-type]  # Prefect's protocol asks for a class method of a function
    timeout_seconds=6 * 3600,
    **cached(
        *("files", "calibrations", "settings", "grams"),
        version=f"{library.SEMANTICS}.{gram_files.SEMANTICS}",
        device_of=computing_in,
    ),
)
def measure(
    files: ModelFiles, calibrations: list[CalibrationEntry], settings: dict[str, Any], grams: bool = False
) -> list[ImportanceEntry] | State[list[ImportanceEntry]]:
    """Measure one model in one pass over those of the calibration sets that it was not measured on before.

    Ends as `Cached` if the store has all measurements.

    Args:
        settings: the fields of `Importance` without the metric, which does not change what a pass measures.
        grams: whether second-order statistics are wanted as well.
    """
    chosen, here = Importance(**settings), default_device()
    found = {
        each: step.find_measured(files.ref, files.read_as, each, chosen, here, grams=grams) for each in calibrations
    }
    missing = [each for each, entry in found.items() if entry is None]
    if not missing:
        entries = [entry for entry in found.values() if entry]
        _describe(files, calibrations, entries)
        assets.found()
        return Completed(name="Cached", message=f"{_what(files, calibrations)}: in the store", data=entries)
    report = Progress("measure", _what(files, missing))
    with device_slot() as device:
        entries = step.measure(
            *(files, calibrations, chosen),
            grams=grams,
            device=device,
            progress=lambda done, total: report(done / total),
        )
    _describe(files, calibrations, entries)
    return entries


def _describe(files: ModelFiles, calibrations: list[CalibrationEntry], entries: list[ImportanceEntry]) -> None:
    pairs = zip(calibrations, entries, strict=True)
    assets.describe(model=files.key, calibrations={c.name: {"digest": e.digest, "tokens": c.tokens} for c, e in pairs})


def measuring(ref: str) -> MaterializingTask[..., Any]:
    """The task `measure` with the assets of one model: Prefect shows the lineage from the model to its importance."""
    return measure.with_options(assets=[assets.importance(ref)], asset_deps=[assets.model(ref)])
