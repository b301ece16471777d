"""Retention: remove what is old and no longer needed in Prefect, MLflow and the store's remote half.

It never removes a registered version, its MLflow run, what it was made from, or the Prefect run that made it.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from uuid import UUID

from prefect import State, flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.exceptions import ObjectNotFound

from lewis.errors import InputError
from lewis.registry import retention as in_mlflow
from lewis.registry import tracking
from lewis.store import outdated as in_remote
from lewis.store import remote
from lewis.store.outdated import Outdated
from lewis_flows import prefect_runs
from lewis_tasks.support import events
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.failures import says_why

DAYS = 90.0
_DAY = 86400.0
_SHOWN = 500  # rows of the table


@flow(name=prefect_runs.RETENTION, flow_run_name="retention", **run_tags.HOOKS)
@says_why
def retention_flow(days: float = DAYS, dry_run: bool = True) -> int | State[int]:
    """Remove runs and entries that ended or were written more than `days` ago and that nothing needs; return how many.

    Args:
        days: the age in days up to which everything is kept.
        dry_run: remove nothing, only list it in the artifact `lewis-retention`.
    """
    run_tags.tag(trigger=run_tags.trigger(run_tags.this_run()))
    found = survey(days)
    dates = [datetime.fromtimestamp(each.time, UTC).date().isoformat() for each in found[:_SHOWN]]
    rows = [
        {"where": each.where, "what": each.what, "of": date, "MB": f"{each.bytes / 1e6:.2f}"}
        for each, date in zip(found, dates, strict=False)
    ]
    text = to_text(found, removed=not dry_run)
    create_table_artifact(rows or [{"where": "all", "what": "nothing"}], key="lewis-retention", description=text)
    if not dry_run:
        remove(found)
    return run_tags.ending("Looked" if dry_run else "Removed", text, len(found))


def to_text(found: list[Outdated], *, removed: bool) -> str:
    """The number of removable items in each place, in a sentence."""
    counts = {where: sum(each.where == where for each in found) for where in dict.fromkeys(e.where for e in found)}
    listed = ", ".join(f"{count} of {where}" for where, count in counts.items()) or "nothing"
    size = f" ({sum(each.bytes for each in found) / 1e6:.1f} MB there)" if any(each.bytes for each in found) else ""
    return f"{listed}{size} {'is removed' if removed else 'would be removed; nothing was'}"


def survey(days: float) -> list[Outdated]:
    """Find what can be removed, and change nothing.

    What is old must be so by the clock of this machine and by that of Prefect's server.

    Raises:
        InputError: as `check_days`; or if there is a remote half, which other machines use too, and no MLflow that
            says what their versions need.
        TransientError, LewisError: if MLflow or the remote half does not answer.
    """
    in_remote.check_days(days)
    if remote.url() and not tracking.exists():
        raise InputError(
            "MLFLOW_TRACKING_URI: expected the MLflow of the machines that share LEWIS_STORE, got none: what their "
            "registered versions need would be removed; set it as the service has it"
        )
    with get_client(sync_client=True) as client:
        before = _now(client) - days * _DAY
        runs, made_versions = in_mlflow.runs(before)
        flow_runs = list(_flow_runs(client, before, made_versions))
    return [*flow_runs, *runs, *in_remote.entries(before, in_mlflow.by_versions())]


def _now(client: SyncPrefectClient) -> float:
    """Unix time in seconds, the earlier of this machine's and the server's: by a clock that is ahead, all is old."""
    return min(time.time(), events.now(client).timestamp())


def remove(found: list[Outdated]) -> None:
    """Remove what `survey` found.

    Raises:
        TransientError, LewisError: if MLflow or the remote half does not answer; what is left is found again.
    """
    with get_client(sync_client=True) as client:
        for each in found:
            if each.where == "prefect":
                _remove_flow_run(client, each.key)
            else:
                (in_mlflow if each.where == "mlflow" else in_remote).remove(each)


def _flow_runs(client: SyncPrefectClient, before: float, kept: set[str]) -> Iterator[Outdated]:
    """Yield old runs that nothing needs, except each flow's and recipe's newest, whose artifacts are the last."""
    seen = set[tuple[str, str]]()
    old = {"before_": datetime.fromtimestamp(before, UTC)}
    for run in prefect_runs.all_of_flows(client, prefect_runs.ALL, prefect_runs.ENDED, end_time=old):
        of = (str(run.flow_id), prefect_runs.recipe_of(run))
        needed = str(run.id) in kept or run_tags.tagged(run, run_tags.BROKEN)
        if of in seen and not needed and run.end_time is not None:
            yield Outdated("prefect", f"run {run.name}, {run.state_name}", str(run.id), run.end_time.timestamp())
        seen.add(of)


def _remove_flow_run(client: SyncPrefectClient, run: str) -> None:
    """Delete a run and its artifacts; its logs go with the server's own vacuum of orphans."""
    of_run = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run]}})
    while page := client.read_artifacts(artifact_filter=of_run, limit=run_tags.PAGE):
        for artifact in page:
            with suppress(ObjectNotFound):
                client.delete_artifact(artifact.id)
    with suppress(ObjectNotFound):
        client.delete_flow_run(UUID(run))
