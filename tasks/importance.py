"""Calibration sets and the importance of one model on them."""

from typing import Any

from prefect import task
from prefect.assets import materialize
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State
from prefect.tasks import MaterializingTask

from lewis.devices import default_device
from lewis.importance import measure as library
from lewis.importance import step
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Importance
from lewis_tasks.support import assets
from lewis_tasks.support.caching import RETRIES, Progress, cached, computing_in
from lewis_tasks.support.device_slot import device_slot


# Not cached: it is cheap, and its result, the digest of the token ids, is what the passes are cached by.
@task(name="calibrate", task_run_name="calibrate {name}", cache_policy=NO_CACHE, timeout_seconds=3600, **RETRIES)
def calibrate(recipe: Recipe, name: str, base: ModelFiles) -> CalibrationEntry:
    """Turn a calibration set into token ids."""
    return step.prepare_calibration(recipe, name, base)


def _what(files: ModelFiles, calibrations: list[CalibrationEntry]) -> str:
    return f"{files.ref} on {', '.join(each.name for each in calibrations)}"


def _run_name(parameters: dict[str, Any]) -> str:
    return f"measure {_what(parameters['files'], parameters['calibrations'])}"


@materialize(
    "lewis://importance/of-a-model",  # `measuring` knows of which
    by="lewis",
    name="measure",
    task_run_name=_run_name,  # type: ignore[arg-type]  # Prefect's protocol asks for a class method of a function
    timeout_seconds=6 * 3600,
    **cached("files", "calibrations", "settings", version=library.SEMANTICS, device_of=computing_in),
)
def measure(
    files: ModelFiles, calibrations: list[CalibrationEntry], settings: dict[str, Any]
) -> list[ImportanceEntry] | State[list[ImportanceEntry]]:
    """One pass of one model over the calibration sets that it was not measured on; `Cached` if there are none.

    `settings` are those of `Importance` without the metric.
    """
    chosen = Importance(**settings)
    found = {each: step.find_measured(files.ref, files.key, each, chosen, default_device()) for each in calibrations}
    missing = [each for each, entry in found.items() if entry is None]
    if not missing:
        entries = [entry for entry in found.values() if entry]
        _describe(files, calibrations, entries)
        assets.found()
        return Completed(name="Cached", message=f"{_what(files, calibrations)}: in the store", data=entries)
    report = Progress("measure", _what(files, missing))
    with device_slot() as device:
        entries = step.measure(
            files, calibrations, chosen, device=device, progress=lambda done, total: report(done / total)
        )
    _describe(files, calibrations, entries)
    return entries


def _describe(files: ModelFiles, calibrations: list[CalibrationEntry], entries: list[ImportanceEntry]) -> None:
    pairs = zip(calibrations, entries, strict=True)
    assets.describe(model=files.key, calibrations={c.name: {"digest": e.digest, "tokens": c.tokens} for c, e in pairs})


def measuring(ref: str) -> MaterializingTask[..., Any]:
    """`measure`, with the lineage of one model."""
    return measure.with_options(assets=[assets.importance(ref)], asset_deps=[assets.model(ref)])
