"""Old runs of MLflow that no registered version needs: find them, and delete them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lewis.registry import logged_model, needed, tracking
from lewis.store.outdated import Outdated

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PARENT = "mlflow.parentRunId"
_FLOW_RUN = "lewis.prefect.flow_run_id"
_CHART = "lewis.champions"  # the run that draws a registered model's history


def runs(before: float) -> tuple[list[Outdated], set[str]]:
    """The runs that ended before a time and that no version, chart or newest search of a name needs.

    Args:
        before: Unix time in seconds.

    Returns:
        Those runs, and the ids of the Prefect runs that made registered versions, which are needed.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    if not tracking.exists():  # a look should not create a database
        return [], set()
    with tracking.client("looking for old runs") as client:
        versions = {str(version.run_id) for version in needed.all_versions(client)}
        found = {str(run.info.run_id): run for run in _all_runs(client)}
    kept = {key for key, run in found.items() if key in versions or _CHART in run.data.tags}
    newest: dict[str, tuple[float, str]] = {}
    for key, run in found.items():
        if key not in kept and _PARENT not in run.data.tags:
            name = str(run.info.run_name)
            newest[name] = max(newest.get(name, (0.0, "")), (float(run.info.start_time), key))
    kept |= {key for _, key in newest.values()}
    kept |= {found[key].data.tags.get(_PARENT, "") for key in kept}
    old = [
        Outdated("mlflow", f"run {run.info.run_name}, {run.info.status.lower()}", key, run.info.end_time / 1000)
        for key, run in found.items()
        if key not in kept and run.data.tags.get(_PARENT) not in kept and _ended_before(run, before)
    ]
    flow_runs = {found[key].data.tags.get(_FLOW_RUN, "") for key in versions & found.keys()} - {""}
    return old, flow_runs


def remove(found: Outdated) -> None:
    """Delete a run, and the models that it logged if no version has them; `mlflow gc` frees their rows and files.

    Raises:
        TransientError: if MLflow does not answer.
        LewisError: if MLflow refuses.
    """
    with tracking.client(f"deleting {found.what}") as client:
        experiment = client.get_run(found.key).info.experiment_id
        models = client.search_logged_models([experiment], f"source_run_id = '{found.key}'")
        for model in models:
            if not any(
                key.startswith("mlflow.modelVersions") and model.tags[key] not in ("", "[]") for key in model.tags
            ):
                logged_model.discard(client, model)
        client.delete_run(found.key)


def _all_runs(client: "MlflowClient") -> Iterator["Run"]:
    """All runs of ours, in the experiment and in those of the teams."""
    base = tracking.experiment_name()
    ids = [e.experiment_id for e in client.search_experiments() if e.name == base or e.name.startswith(f"{base}/")]
    token: str | None = None
    while ids and (token is None or token):
        page = client.search_runs(ids, max_results=1000, page_token=token)
        yield from (run for run in page if any(tag.startswith("lewis.") for tag in run.data.tags))
        token = page.token or ""


def _ended_before(run: "Run", before: float) -> bool:
    return run.info.status != "RUNNING" and bool(run.info.end_time) and run.info.end_time / 1000 < before
