"""Which version replaced which as champion, and why: an append-only list in the tags of the registered model.

`lewis.registry.promotion` writes a record before it moves the alias. If it dies in between, the next run moves the
alias without a second record.

The scores of the versions and of the champion are drawn as a chart in MLflow, in one run for each registered model, and
as a picture. If a process dies before it has added an entry to the chart, the next one adds it.
"""

import getpass
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

from lewis.errors import InputError, LewisError
from lewis.evaluation.statistics import power
from lewis.registry import tracking
from lewis.reports.charts import MOVES, champion_steps

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

TAG = "mlflow.lewis.history."  # MLflow's pages hide tags that begin with its own name
_SHOWN = "lewis.registry.history."  # the prefix in earlier releases; MLflow's pages show the long JSON of such tags
TEAM = "lewis.team"  # tag of a registered model, and of its versions: `register.team`
REFUSED = ("rejected", "refused", "waits", "lapsed")
"""Values of `Record.what` for events that did not change the champion."""
_JUDGED = ("promoted", "rejected", "waits")  # values of `Record.what` for the verdicts of a gate
METRIC = "lewis.metric"  # tag of a version: the score that its gate looked at
LUCK = "lewis.luck"  # tag of a version: the standard error of that score, below 0 if lower is better
MARK = "lewis.mark"  # tag of a version that passed: the number of the mark (`lewis.evaluation.gate`), perhaps its own
CHART = "lewis.champions"  # tag of the run that draws the history of a registered model
_ENTRIES = "history entries"
_MOST = 4000  # characters of a reason: PostgreSQL refuses a tag of a registered model that has more than 5000


@dataclass(frozen=True)
class Record:
    """One event in the life of a registered model.

    Attributes:
        time: UTC, ISO 8601.
        what: `promoted`, `rejected`, `promoted by hand`, `rolled back`; `waits` for approval, `approved`, `refused` by
            hand, or `lapsed` because nobody approved it in time or the champion changed; or `repaired`: the same
            merge, registered again because the champion's files were damaged.
        version: `uri` of the new champion, or of the version that did not become it.
        champion: `uri` of the version that was in use before; None if there was none.
        why: the gate's rules, or a person's reason.
        by: the user, or the run.
    """

    time: str
    what: str
    version: str
    champion: str | None
    why: str
    by: str


def history(name: str) -> list[Record]:
    """All records of a registered model, oldest first.

    Raises:
        InputError: if there is no such model.
    """
    name = tracking.model_name(name)
    tracking.check_exists(name)
    with tracking.client(f"reading the history of {name}") as client:
        return read(client, name)


def lost_champion(name: str) -> str:
    """Return the number of the version that became the champion last, if the model has no champion now; else empty.

    Somebody deleted the version, or took its alias away, in MLflow: LEWIS itself only moves the alias.
    """
    name = tracking.model_name(name)
    if not tracking.exists():  # a question should not create a database
        return ""
    with tracking.client(f"reading the history of {name}") as client:
        try:
            model = registered_model(client, name)
        except InputError:  # before the first registration
            return ""
    moves = [each for each in in_tags(name, model.tags) if each.what in MOVES]
    return moves[-1].version.rpartition("/")[2] if moves and "champion" not in model.aliases else ""


def record(
    client: "MlflowClient", name: str, what: str, version: str, champion: str | None, why: str, by: str = ""
) -> bool:
    """Append a record to a model's history, unless the newest one says the same. Call it under the registry's lock.

    A reason that is too long is cut; of the gate's rules, those that passed are cut first.

    Args:
        what, version, champion, why: as in `Record`.
        by: as in `Record`; by default the name of the user.

    Returns:
        Whether a record was appended.
    """
    if len(why) > _MOST:
        rules = sorted(why.split("; "), key=lambda rule: rule.endswith(": pass"))
        why = tracking.cut("; ".join(rules), _MOST, "verdict.json")
    new = Record(datetime.now(UTC).isoformat(), what, version, champion, why, by or _user())
    known = read(client, name)
    if known and replace(known[-1], time=new.time, by=new.by) == new:
        return False
    text = json.dumps(asdict(new), ensure_ascii=False)
    client.set_registered_model_tag(name, f"{TAG}{new.time.replace(':', '.')[:26]}-{uuid4().hex[:4]}", text)
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return f"user {os.getuid()}"


def last_judged(records: Sequence[Record]) -> dict[str, str]:
    """Return the versions that a gate judged, or that took the place of a damaged champion -> when last (`time`)."""
    return {each.version: each.time for each in records if each.what in (*_JUDGED, "repaired")}


def judged(records: Sequence[Record], mark: str | None) -> list[str]:
    """The versions that a gate judged since the mark became the champion, each once, in their order.

    A rollback to the mark does not start the count again: the error allowed against one mark is spent only once.

    Args:
        records: oldest first.
        mark: `uri` of a version; None: all versions count.
    """
    moves = set(MOVES) - {"rolled back"}
    starts = [place for place, each in enumerate(records, 1) if each.what in moves and each.version == mark]
    since = records[starts[-1] if starts else 0 :]
    return list(dict.fromkeys(each.version for each in since if each.what in _JUDGED))


def lines(records: Sequence[Record], *, verbose: bool = False) -> list[str]:
    """Format each record as one line, newest first: when, what, which version in place of which, why, by whom.

    Of the gate's rules, a line has only those that failed, unless `verbose` is true.
    """
    numbered = [(each, f"v{each.version.rpartition('/')[2]}") for each in reversed(records)]
    return [
        f"{each.time[:16].replace('T', ' ')}  {each.what:<16} {version:<5} {_beside(each):<16} "
        f"{_reason(each, verbose)}({each.by})"
        for each, version in numbered
    ]


def _reason(record: Record, verbose: bool) -> str:
    every = verbose or record.what not in _JUDGED  # a person's reason may end like a rule
    rules = [rule for rule in " ".join(record.why.split()).split("; ") if every or not rule.endswith(": pass")]
    return f"{'; '.join(rules)} " if rules else ""


def _beside(record: Record) -> str:
    """Say how the version of a record relates to the champion before: `in place of v3`, `v3 stays` or `the first`."""
    if record.champion is None:
        return "" if record.what in REFUSED else "the first"
    before = f"v{record.champion.rpartition('/')[2]}"
    return f"{before} stays" if record.what in REFUSED else f"in place of {before}"


def read(client: "MlflowClient", name: str) -> list[Record]:
    """Return all records of a registered model, oldest first, with a client that is open already."""
    return in_tags(name, registered_model(client, name).tags)


def in_tags(name: str, tags: Mapping[str, str]) -> list[Record]:
    """Return all records that the tags of a registered model hold, oldest first.

    Raises:
        LewisError: if a tag is no such record.
    """
    keys = {key.removeprefix(TAG).removeprefix(_SHOWN): key for key in tags if key.startswith((TAG, _SHOWN))}
    found = list[Record]()
    for time in sorted(keys):
        try:
            found.append(_record(tags[keys[time]]))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise LewisError(
                f"{name}: its tag {keys[time]} in MLflow is no record of its history ({error}): a person or a newer "
                "LEWIS wrote it; remove it, or install the newer one here"
            ) from error
    return found


def _record(text: str) -> Record:
    found = Record(**json.loads(text))
    "".join((found.time, found.what, found.why, found.by))  # raises if one is no text, as `_number` does
    for uri in (found.version, *([] if found.champion is None else [found.champion])):
        _number(uri)
    return found


def registered_model(client: "MlflowClient", name: str) -> "RegisteredModel":
    """Return MLflow's description of a registered model.

    Raises:
        InputError: if there is no model of this name.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise InputError(f"{name}: MLflow has no registered model of this name") from error
        raise


@dataclass(frozen=True)
class Point:
    """One entry of a history, with the scores of its version and of the champion after it.

    Attributes:
        step: the highest version number so far.
        version: the number of the version that the entry is about.
        what: as in `Record`.
        scores: name in MLflow, such as `task/metric` -> score of that version; empty if nothing was scored.
        champion: the champion's scores after the entry, in the same form; None if there is no champion.
    """

    step: int
    version: int
    what: str
    scores: Mapping[str, float]
    champion: Mapping[str, float] | None


def points(records: Sequence[Record], scores: Mapping[int, Mapping[str, float]]) -> list[Point]:
    """Return each record of a history with the scores of its version and of the champion after it.

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
    """Log the entries of a model's history that its chart in MLflow lacks; call it under the registry's lock."""
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    records, scores, _ = _read(client, name)
    run, known = _run(client, name)
    if known >= len(records):
        return
    now, new, every = get_current_time_millis(), list[Metric](), points(records, scores)
    for point in every[known:]:
        parts = {"version": point.scores, "champion": point.champion or {}}
        new += [
            Metric(tracking.key(f"{part}/{metric}"), value, now, point.step)
            for part, each in parts.items()
            for metric, value in each.items()
        ]
    new.append(Metric(_ENTRIES, len(records), now, every[-1].step))
    for start in range(0, len(new), tracking.BATCH):
        client.log_batch(run, new[start : start + tracking.BATCH])


def score(name: str, version: str) -> tuple[str, float] | None:
    """Return the name in MLflow and the value of the score that a version's gate looked at; None if there is none."""
    name = tracking.model_name(name)
    with tracking.client(f"reading the score of {name}/{version}") as client:
        found = client.get_model_version(name, version)
        metric, values = tracking.key(found.tags.get(METRIC, "")), _scores(client, found.run_id)
    return (metric, values[metric]) if metric in values else None


def scores(name: str, most: int = 20) -> dict[int, float]:
    """Return number -> score of the last `most` versions, oldest first, in the metric of the newest gate.

    A version without a finite score is left out; for an infinite one, MLflow gives the largest float.
    """
    from mlflow.entities import ViewType

    name = tracking.model_name(name)
    with tracking.client(f"reading the scores of {name}") as client:
        versions = client.search_model_versions(f"name='{name}'", max_results=most, order_by=["version_number DESC"])
        metric = next((tracking.key(each.tags[METRIC]) for each in versions if METRIC in each.tags), "")
        ids = ", ".join(f"'{each.run_id}'" for each in versions)
        if not (metric and ids):
            return {}
        experiments = [tracking.experiment(client, team) for team in {each.tags.get(TEAM, "") for each in versions}]
        runs = client.search_runs(experiments, f"attributes.run_id IN ({ids})", ViewType.ALL, most)
    values = {run.info.run_id: run.data.metrics.get(f"merged/{metric}") for run in runs}
    found = {int(each.version): values.get(each.run_id) for each in reversed(versions)}
    return {number: value for number, value in found.items() if value is not None and abs(value) < sys.float_info.max}


def picture(name: str) -> bytes:
    """Draw the score that the gate looks at, of every version and of the champion, as a PNG file.

    Only versions that were scored on the same documents as the champion are drawn; if the champion has no score, on the
    documents of most versions. The picture names the others, such as those whose evaluation ended early. A line shows
    what the best of so many versions would score by luck, if all were as good as the first.

    Raises:
        InputError: if there is no such model, or nothing was scored.
    """
    name = tracking.model_name(name)
    tracking.check_exists(name)
    with tracking.client(f"reading the history of {name}") as client:
        records, scores, metric = _read(client, name)
        scored = [number for number in sorted(scores, reverse=True) if metric in scores[number]]
        if metric is None or not scored:
            raise InputError(f"{name}: no version of it has a score; there is nothing to plot")
        versions = client.search_model_versions(f"name='{name}'")
        documents = {int(each.version): _documents(client, each.run_id, metric) for each in versions}
    champions = [_number(each.version) for each in records if each.what in MOVES]
    of = champions[-1:] if champions and champions[-1] in scored else scored
    common = statistics.mode(documents[number] for number in of)
    others = [number for number, each in scores.items() if metric in each and documents[number] != common]
    scores = {number: each for number, each in scores.items() if documents[number] == common}
    drawn = [
        (each.step, each.version, each.what, each.scores.get(metric), (each.champion or {}).get(metric))
        for each in points(records, scores)
    ]
    alike = [each.tags for each in versions if documents[int(each.version)] == common]
    errors = [float(tags[LUCK]) for tags in alike if LUCK in tags]
    return champion_steps(drawn, metric, by_luck(drawn, statistics.median(errors)) if errors else (), others)


def by_luck(drawn: Sequence[tuple[int, int, str, float | None, float | None]], error: float) -> list[float]:
    """Return what the best of so many versions would score by luck, if all were as good as the first, for each entry.

    Args:
        drawn: the entries, as `points` of `lewis.reports.charts.champion_steps`.
        error: standard error of a score, below 0 if lower is better.
    """
    first = next((each[3] for each in drawn if each[3] is not None), math.nan)
    seen, found = set[int](), list[float]()
    for _, version, _, score, _ in drawn:
        seen |= {version} if score is not None else set()
        found.append(first + error * power.luck(len(seen)))
    return found


def _read(client: "MlflowClient", name: str) -> tuple[list[Record], dict[int, Mapping[str, float]], str | None]:
    """Return a model's history, number -> scores of its versions, and the name of the newest gate's metric."""
    records = read(client, name)
    versions = sorted(client.search_model_versions(f"name='{name}'"), key=lambda version: int(version.version))
    scores: dict[int, Mapping[str, float]] = {int(each.version): _scores(client, each.run_id) for each in versions}
    named = [tracking.key(each.tags[METRIC]) for each in versions if METRIC in each.tags]
    known = [metric for each in scores.values() for metric in each]
    return records, scores, named[-1] if named else min(known, default=None)


def _scores(client: "MlflowClient", run: str | None) -> dict[str, float]:
    """Return the merged model's scores in a run, by their names in MLflow; empty if the run is gone."""
    found = tracking.run_of(client, run)
    metrics = found.data.metrics if found else {}
    return {name.removeprefix("merged/"): value for name, value in metrics.items() if name.startswith("merged/")}


def _documents(client: "MlflowClient", run: str | None, metric: str) -> str:
    """The digest of the documents that a score was measured on; empty if it is not known."""
    found = tracking.run_of(client, run)
    inputs = found.inputs.dataset_inputs if found and found.inputs else []
    # A run whose scores were completed has two inputs of a task: the one of all documents is sorted last, and counts.
    by_part = sorted(inputs, key=lambda each: tracking.PART not in {tag.key for tag in each.tags})
    named = {each.dataset.name: each.dataset.digest for each in by_part}
    return str(named.get(metric.partition("/")[0], ""))


def _run(client: "MlflowClient", name: str) -> tuple[str, int]:
    """Return the id of the run with a model's chart, created if it is missing, and how many history entries it has."""
    experiment = tracking.experiment(client, registered_model(client, name).tags.get(TEAM, ""))
    search = ([experiment], f"tags.`{CHART}` = '{name}'")
    if not (found := client.search_runs(*search)):
        client.create_run(experiment, run_name=f"{name}: champions", tags={CHART: name})
        found = client.search_runs(*search)
    run, *others = sorted(found, key=_entries, reverse=True)
    for each in others:  # duplicates, since MLflow's client sent the request again
        client.delete_run(each.info.run_id)
    if run.info.status == "RUNNING":
        client.set_terminated(run.info.run_id)
    return str(run.info.run_id), _entries(run)


def _entries(run: "Run") -> int:
    return int(run.data.metrics.get(_ENTRIES, 0))


def _number(uri: str) -> int:
    return int(uri.rpartition("/")[2])
