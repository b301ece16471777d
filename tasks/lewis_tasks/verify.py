"""Prefect task that checks every entry of the store and every registered version again."""

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from lewis.errors import LewisError
from lewis.registry import repair
from lewis_tasks.support.caching import RETRIES


@task(name="verify", task_run_name="verify", cache_policy=NO_CACHE, timeout_seconds=24 * 3600, **RETRIES)
def verify() -> int:
    """Check all entries and versions without remembered checksums, show damaged ones; return how many were checked.

    Raises:
        LewisError: if something is damaged.
    """
    found = repair.verify()
    rows = [{"kind": each.kind, "entry": each.entry, "what is wrong": each.why} for each in found.damaged]
    create_table_artifact(
        rows or [{"kind": "all", "entry": found.to_text(), "what is wrong": ""}],
        key="lewis-verify",
        description=found.to_text(),
    )
    if found.damaged:
        raise LewisError(found.to_text())
    return found.checked
