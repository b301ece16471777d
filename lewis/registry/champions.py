"""How good the champion of a registered model was over its versions: a chart in MLflow, and a picture.

The chart is one run of MLflow for each registered model. It follows the model's history: what a process that died did
not log, the next one does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lewis.errors import InputError
from lewis.registry import history, tracking
from lewis.registry.history import REFUSED, Record
from lewis.reports.charts import champion_steps

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRIC = "lewis.metric"  # tag of a version: the score that its gate looked at
_RUN, _ENTRIES = "lewis.champions", "history entries"


@dataclass(frozen=True)
class Point:
    """The scores after one entry of the history.

    Attributes:
        step: the highest version so far.
        version: the number that the entry is about.
        what: as of `Record`.
        scores: name in MLflow, such as `task/metric` -> score of that version; empty if nothing was scored.
        champion: the same of the champion since then; None if there is none.
    """

    step: int
    version: int
    what: str
    scores: Mapping[str, float]
    champion: Mapping[str, float] | None


def points(records: Sequence[Record], scores: Mapping[int, Mapping[str, float]]) -> list[Point]:
    """The scores over a history.

    Args:
        records: oldest first.
        scores: version -> name in MLflow -> score.
    """
    found, step = list[Point](), 0
    for each in records:
        number = _number(each.version)
        step = max(step, number)
        holds = each.champion if each.what in REFUSED else each.version
        champion = scores.get(_number(holds), {}) if holds else None
        found.append(Point(step, number, each.what, scores.get(number, {}), champion))
    return found


def follow(client: "MlflowClient", name: str) -> None:
    """Bring the chart of a model up to date; call it under the registry's lock."""
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    records, scores, _ = _read(client, name)
    run, known = _run(client, name)
    if known >= len(records):
        return
    now, new = get_current_time_millis(), list[Metric]()
    for point in points(records, scores)[known:]:
        parts = {"version": point.scores, "champion": point.champion or {}}
        new += [
            Metric(tracking.key(f"{part}/{metric}"), value, now, point.step)
            for part, each in parts.items()
            for metric, value in each.items()
        ]
    new.append(Metric(_ENTRIES, len(records), now, points(records, scores)[-1].step))
    for start in range(0, len(new), tracking.BATCH):
        client.log_batch(run, new[start : start + tracking.BATCH])


def picture(name: str) -> bytes:
    """The score that the gate looks at, of every version and of the champion; a PNG file.

    Raises:
        InputError: if there is no such model, or nothing was scored.
    """
    name = tracking.model_name(name)
    with tracking.client(f"reading the history of {name}") as client:
        records, scores, metric = _read(client, name)
    if metric is None:
        raise InputError(f"{name}: no version of it has a score; there is nothing to plot")
    drawn = [
        (each.step, each.version, each.what, each.scores.get(metric), (each.champion or {}).get(metric))
        for each in points(records, scores)
    ]
    return champion_steps(drawn, metric)


def _read(client: "MlflowClient", name: str) -> tuple[list[Record], dict[int, Mapping[str, float]], str | None]:
    """A model's history, the scores of its versions, and the score that the newest gate looked at."""
    records = history.read(client, name)
    versions = sorted(client.search_model_versions(f"name='{name}'"), key=lambda version: int(version.version))
    scores: dict[int, Mapping[str, float]] = {int(each.version): _scores(client, each.run_id) for each in versions}
    named = [tracking.key(each.tags[METRIC]) for each in versions if METRIC in each.tags]
    known = [metric for each in scores.values() for metric in each]
    return records, scores, named[-1] if named else min(known, default=None)


def _scores(client: "MlflowClient", run: str | None) -> dict[str, float]:
    """The merged model's scores, by their names in MLflow."""
    found = client.get_run(run).data.metrics if run else {}
    return {name.removeprefix("merged/"): value for name, value in found.items() if name.startswith("merged/")}


def _run(client: "MlflowClient", name: str) -> tuple[str, int]:
    """The run of the chart, made when it is missing, and how many entries of the history it has."""
    experiment = tracking.experiment(client, history.registered_model(client, name).tags.get(history.TEAM, ""))
    for run in client.search_runs([experiment], f"tags.`{_RUN}` = '{name}'"):
        return str(run.info.run_id), int(run.data.metrics.get(_ENTRIES, 0))
    made = client.create_run(experiment, run_name=f"{name}: champions", tags={_RUN: name})
    client.set_terminated(made.info.run_id)
    return str(made.info.run_id), 0


def _number(uri: str) -> int:
    return int(uri.rpartition("/")[2])
