"""Calibration sets and the importance of one model on one of them."""

from typing import Any

from prefect import task
from prefect.assets import materialize
from prefect.cache_policies import NO_CACHE
from prefect.tasks import MaterializingTask

from lewis import importance as library
from lewis import pipeline
from lewis.entries import CalibrationEntry, ImportanceEntry, ModelFiles
from lewis.recipe import Importance, Recipe
from tasks import assets
from tasks.caching import RETRIES, Progress, cached, computing_in
from tasks.device import device_slot


# Not cached: it is cheap, and its result, the digest of the token ids, is what the passes are cached by.
@task(name="calibrate", task_run_name="calibrate {name}", cache_policy=NO_CACHE, timeout_seconds=3600, **RETRIES)
def calibrate(recipe: Recipe, name: str, base: ModelFiles) -> CalibrationEntry:
    """Turn a calibration set into token ids."""
    return pipeline.prepare_calibration(recipe, name, base)


@materialize(
    "lewis://importance/of-a-model",  # `measuring` knows of which
    by="lewis",
    name="measure",
    task_run_name="measure {files.ref} on {calibration.name}",
    timeout_seconds=6 * 3600,
    **cached("files", "calibration", "settings", version=library.SEMANTICS, device_of=computing_in),
)
def measure(files: ModelFiles, calibration: CalibrationEntry, settings: dict[str, Any]) -> ImportanceEntry:
    """One pass of one model over one calibration set; `settings` are those of `Importance` without the metric."""
    report = Progress("measure", f"{files.ref} on {calibration.name}")
    with device_slot() as device:
        found = pipeline.measure(
            files,
            calibration,
            Importance(**settings),
            device=device,
            progress=lambda done, total: report(done / total),
        )
    assets.describe(digest=found.digest, model=files.key, calibration=calibration.name, tokens=calibration.tokens)
    return found


def measuring(ref: str) -> MaterializingTask[[ModelFiles, CalibrationEntry, dict[str, Any]], ImportanceEntry]:
    """`measure`, with the lineage of one model."""
    return measure.with_options(assets=[assets.importance(ref)], asset_deps=[assets.model(ref)])
