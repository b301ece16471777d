"""Find the page of a run: by the recipe, whose last run it is, by the run, or by the version that the run made."""

from pathlib import Path

from lewis import store
from lewis.errors import InputError, LewisError, nearest
from lewis.registry import pull, tracking, versions
from lewis.store import kinds
from lewis_flows.service import servers

ID = 36  # characters of the id of a run, which ends the name of its page


def find(what: str) -> Path:
    """Find the page of a run in the store; return its path.

    Args:
        what: name or file of a recipe, id or name of a run, or a version as `lewis pull` takes it.

    Raises:
        InputError: if there is none.
        TransientError: if a server does not answer.
    """
    pages = sorted(kinds.REPORTS.entries(), key=lambda path: path.stat().st_mtime)
    recipe = Path(what).stem if what.endswith((".yaml", ".yml")) else what
    found = [path for path in pages if recipe == path.stem[: -ID - 1] or (len(what) > 7 and _id(path).startswith(what))]
    if not found:
        ids = _runs_named(what)
        found = [path for path in pages if _id(path) in ids]
    if found:
        return found[-1]
    if page := _of_version(what):
        return page
    known = dict.fromkeys(path.stem[: -ID - 1] for path in pages)
    raise InputError(
        f"{what}: expected a recipe or a run with a page here, or a version such as my-merge/3"
        f"{nearest(what, [*known]) or '; `lewis run` writes one'}"
    )


def _id(path: Path) -> str:
    return path.stem[-ID:]


def _runs_named(name: str) -> set[str]:
    """Return the ids of the runs of a name; none if no Prefect server runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    from lewis_flows.service.credentials import connected

    if not (url := servers.running()):
        return set()
    wanted = FlowRunFilter.model_validate({"name": {"any_": [name]}})
    with connected(url), get_client(sync_client=True) as client:
        return {str(run.id) for run in client.read_flow_runs(flow_run_filter=wanted, limit=20)}


def _of_version(what: str) -> Path | None:
    """Load the page of the run that made a version from MLflow; None if `what` is no version, LewisError if no page."""
    from mlflow.exceptions import MlflowException

    try:
        name, *_ = pull.named(what)
    except InputError:
        return None
    if not tracking.exists():
        return None
    with tracking.client(f"looking for the page of {what}") as client:
        if not client.search_model_versions(f"name='{tracking.model_name(name)}'", max_results=1):
            return None
        run = tracking.run_of(client, pull.version_of(client, what).run_id)
        if run is None:
            raise LewisError(f"{what}: MLflow has no run that made it, and so no page of it")
        path = kinds.REPORTS.path(f"{name}_{run.data.tags.get('lewis.prefect.flow_run_id', run.info.run_id):>{ID}}")
        made = path.stat().st_mtime if path.exists() else run.info.start_time / 1000
        try:  # also if it is here: a canary may have been added since
            page = tracking.file_of(client, run.info.run_id, versions.PAGE).decode()
            store.write_text(path, page, modified=made)  # `find` takes a recipe's newest page for that of its last run
        except (OSError, MlflowException) as error:
            if not path.exists():
                raise LewisError(f"{what}: the run that made it has no {versions.PAGE}") from error
    return path
