"""Metrics from the registry: versions, their scores, and how long a release took to get into the champion.

The registry has the commits that a champion was merged from, and Prefect's events have the time at which each commit
was seen. The Hub is not asked: polls do that.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import NamedTuple

from prefect.client.orchestration import get_client
from prometheus_client.core import Metric

from lewis.errors import LewisError, TransientError
from lewis.models.source import commits_of
from lewis.registry import history, releases
from lewis.serving import hub, records, slots
from lewis.serving.records import Served
from lewis_flows import recipes_folder, release_event
from lewis_flows.service.metrics import of_prefect
from lewis_flows.service.processes import answers

REMEMBERED = timedelta(days=7)  # how long Prefect keeps events


class Release(NamedTuple):
    """A release that was announced: its recipe, the reference in the recipe, the commit, and when."""

    recipe: str
    ref: str
    new: str
    time: datetime


def read() -> Iterator[Metric]:
    """Ask the registry about each recipe that registers a model, and yield its metrics.

    Raises:
        LewisError: if MLflow does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http") and not answers(f"{uri.rstrip('/')}/health"):  # MLflow's client retries for minutes
        raise LewisError("MLflow does not answer")
    seen, score_of = _announced(), cache(history.score)  # the newest version may be the champion
    version, waiting, took = (dict[tuple[str, ...], float]() for _ in range(3))
    served, failed, since, share = (dict[tuple[str, ...], float]() for _ in range(4))
    here = slots.now()
    scores = {"champion": dict[tuple[str, ...], float](), "newest version": dict[tuple[str, ...], float]()}
    for recipe in recipes_folder.names():
        if not (model := recipes_folder.registered_name(recipe)):
            continue
        try:
            held = releases.merged(model)
            targets = records.served(model) if held else []
            champion = releases.champion(held)
            lost = champion is None and history.lost_champion(model)
        except TransientError:
            raise
        except LewisError:  # a tag of one model that is no record, which `lewis status` names, hides no other model
            continue
        for record in targets:
            at = record.recipe or recipe, model, record.target  # a recipe of a group has targets of its own
            served[at] = float(record.uri.rpartition("/")[2] or 0)
            failed[at] = float(record.failure is not None and _has(recipe, record))
            if record.uri:
                since[at] = datetime.fromisoformat(record.since).timestamp()
            if record.kind == "local":
                share[at] = (here.share(record.alias) if here else 0) / 100
        waiting[recipe, model] = float(releases.waiting(held) is not None)
        for which, each in {"champion": champion, "newest version": held[0] if held else None}.items():
            if each and (score := score_of(model, each.version)):
                scores[which][recipe, model, score[0]] = score[1]
        if lost:
            version[recipe, model] = 0.0
        if champion is not None:
            version[recipe, model] = float(champion.version)
            mine = [release for release in seen if release.recipe == recipe]
            if (seconds := _took(mine, champion, _promoted(model, champion.version))) is not None:
                took[recipe, model] = seconds
    labels = ["recipe", "model"]
    about = "The version in use; 0 if there is none any more, since somebody deleted it or its alias in MLflow."
    yield of_prefect.gauge("lewis_champion_version", about, labels, version)
    about = "The version that a target has in service; 0 if it has none."
    yield of_prefect.gauge("lewis_served_version", about, [*labels, "target"], served)
    about = "When a target took the version that it has in service, Unix time."
    yield of_prefect.gauge("lewis_served_since_seconds", about, [*labels, "target"], since)
    about = "The share of the requests that this version gets from `lewis up --serve`, 0 to 1."
    yield of_prefect.gauge("lewis_served_share", about, [*labels, "target"], share)
    about = "1 if a target did not take the version that it was given last."
    yield of_prefect.gauge("lewis_serve_failed", about, [*labels, "target"], failed)
    about = "Versions that passed their gate and wait for a person, `lewis approve`."
    yield of_prefect.gauge("lewis_versions_waiting", about, labels, waiting)
    for which, values in scores.items():
        name = "lewis_champion_score" if which == "champion" else "lewis_last_score"
        about = f"The score of the {which} that its gate looked at."
        yield of_prefect.gauge(name, about, [*labels, "metric"], values)
    about = "From the newest release in the champion to when it became that; left out if that release is not known."
    yield of_prefect.gauge("lewis_release_to_champion_seconds", about, labels, took)


def _has(name: str, record: Served) -> bool:
    """Whether a recipe still has the target of a record, as far as its file can be read."""
    try:
        return hub.has(recipes_folder.load(name), record)
    except Exception:  # of any kind, as in `recipes_folder.load_all`; the poll reports it
        return True


def _announced() -> list[Release]:
    with get_client(sync_client=True) as client:
        events = release_event.announced(client, datetime.now(UTC) - REMEMBERED)
    payloads = [(event.payload, event.occurred) for event in events]
    return [Release(str(of.get("recipe")), str(of.get("ref")), str(of.get("new")), time) for of, time in payloads]


def _took(seen: Sequence[Release], champion: releases.Held, promoted: datetime | None) -> float | None:
    if promoted is None:
        return None
    times = [release.time for release in seen if _holds(champion, release) and release.time <= promoted]
    return (promoted - max(times)).total_seconds() if times else None


def _holds(champion: releases.Held, release: Release) -> bool:
    """Whether a champion was merged from a release's commit, which may be that of one part of `base+adapter`."""
    held = champion.commit_of(release.ref)
    return held is not None and (held == release.new or release.new in commits_of(held))


def _promoted(model: str, version: str) -> datetime | None:
    records = [each for each in history.history(model) if each.version.rpartition("/")[2] == version]
    moved = [each for each in records if each.what not in history.REFUSED]
    return datetime.fromisoformat(moved[-1].time) if moved else None
