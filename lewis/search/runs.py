"""A search in MLflow: one run, with a nested run per trial. Recording can be repeated, also after a kill."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lewis.registry import tracking
from lewis.search.study import Objective, Trial

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SEARCH, _TRIAL, _PARENT = "lewis.search", "lewis.trial", "mlflow.parentRunId"
_STATUS = {"done": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


def record(
    name: str,
    team: str,
    parameters: Mapping[str, str],
    digest: str,
    objectives: Sequence[Objective],
    trials: Sequence[Trial],
    *,
    files: Mapping[str, bytes] | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Record in MLflow the trials of a search that have ended, and at the end of the search its result.

    Args:
        name: of the recipe.
        team: the owner of the experiment in MLflow; empty: none.
        parameters: the recipe, flat: `a.b.0.c` -> value.
        digest: of the search.
        objectives: the metrics of the trials' scores.
        trials: all trials; those that run are left out.
        files: name -> content of the search's report. If they are given, the search's run ends.
        tags: of the search's run, such as its winner.

    Returns:
        id of the search's run.

    Raises:
        TransientError, LewisError: as `tracking.client`.
    """
    with tracking.client(f"recording the search of {name}") as client:
        experiment = tracking.experiment(client, team)
        parent = _parent(client, experiment, name, parameters, digest)
        recorded = tracking.every(client.search_runs, [experiment], f"tags.`{_PARENT}` = '{parent}'")
        begun = {run.data.tags.get(_TRIAL): run.info for run in recorded}
        for trial in trials:
            known = begun.get(str(trial.number))
            if trial.state in _STATUS and (known is None or known.status == "RUNNING"):  # left by a kill in `_add`
                _add(client, experiment, parent, objectives, trial, known.run_id if known else "")
        for tag, value in (tags or {}).items():
            client.set_tag(parent, tag, value)
        if files is not None:
            tracking.log_files(client, parent, files)
            client.set_terminated(parent, "FINISHED")
        return parent


def _parent(client: "MlflowClient", experiment: str, name: str, parameters: Mapping[str, str], digest: str) -> str:
    found = client.search_runs([experiment], f"tags.`{_SEARCH}` = '{digest}' and tags.`{_TRIAL}` = 'all'")
    if found:
        if found[0].info.status != "RUNNING":
            client.update_run(found[0].info.run_id, status="RUNNING")  # the search continues
        return str(found[0].info.run_id)
    run = client.create_run(experiment, run_name=f"search {name}", tags={_SEARCH: digest, _TRIAL: "all"})
    tracking.log_numbers(client, run.info.run_id, None, parameters, {})
    return str(run.info.run_id)


def _add(
    client: "MlflowClient", experiment: str, parent: str, objectives: Sequence[Objective], trial: Trial, run: str
) -> None:
    tags: dict[str, Any] = {_PARENT: parent, _TRIAL: str(trial.number)}
    if trial.reason:
        tags["lewis.reason"] = tracking.cut(trial.reason, tracking.MAX_PARAM, "the log")
    run = run or client.create_run(experiment, run_name=f"trial {trial.number}", tags=tags).info.run_id
    scores = dict(zip((o.metric for o in objectives), trial.scores, strict=True)) if trial.state == "done" else {}
    tracking.log_numbers(client, run, None, dict(trial.values), {**scores, "seconds": trial.seconds})
    client.set_terminated(run, _STATUS[trial.state])
