"""Calibration sets and the importance of one model on one of them."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from lewis import importance as library
from lewis import pipeline
from lewis.device import default_device, precision
from lewis.entries import CalibrationEntry, ImportanceEntry, ModelFiles
from lewis.recipe import Recipe
from tasks.caching import RETRIES, Progress, cached, device_slot


# Not cached: it is cheap, and its result, the digest of the token ids, is what the passes are cached by.
@task(name="calibrate", task_run_name="calibrate {name}", cache_policy=NO_CACHE, timeout_seconds=3600, **RETRIES)
def calibrate(recipe: Recipe, name: str, base: ModelFiles) -> CalibrationEntry:
    """Turn a calibration set into token ids."""
    return pipeline.prepare_calibration(recipe, name, base)


@task(
    name="measure",
    task_run_name="measure {files.ref} on {calibration.name}",
    timeout_seconds=6 * 3600,
    **cached("files", "calibration", version=f"{library.SEMANTICS}-{precision(default_device())}"),
)
def measure(files: ModelFiles, calibration: CalibrationEntry) -> ImportanceEntry:
    """One forward pass of one model over one calibration set."""
    report = Progress("measure", f"{files.ref} on {calibration.name}")
    with device_slot() as device:
        return pipeline.measure(files, calibration, device=device, progress=lambda done, total: report(done / total))
