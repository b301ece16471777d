"""Bring a pinned model to the disk, verified."""

from prefect import task

from lewis.models import source as models
from lewis.models.source import ModelFiles, Source
from lewis_tasks.support.caching import RETRIES, cached


@task(name="download", task_run_name="download {source.ref}", timeout_seconds=6 * 3600, **cached("source"), **RETRIES)
def download(source: Source) -> ModelFiles:
    """The files of exactly the pinned commit, with verified checksums."""
    return models.download(source)
