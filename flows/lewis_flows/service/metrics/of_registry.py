"""Numbers of the champions: how far each is behind the releases that were seen.

The registry says which commits a champion was merged from, and Prefect's events when which commit was seen. The Hub is
not asked: polls do that.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from prefect.client.orchestration import get_client
from prometheus_client.core import Metric

from lewis.errors import LewisError
from lewis.models.source import commits_of
from lewis.registry import history, releases, tracking
from lewis_flows import recipes_folder
from lewis_flows.service.metrics import of_prefect
from lewis_flows.service.processes import answers

REMEMBERED = timedelta(days=7)  # for so long Prefect keeps events


class Release(NamedTuple):
    """A release that was announced: its recipe, the reference in the recipe, the commit, and when."""

    recipe: str
    ref: str
    new: str
    time: datetime


def read() -> Iterator[Metric]:
    """Ask the registry for each recipe that registers a model.

    Raises:
        LewisError: if MLflow does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http") and not answers(f"{uri.rstrip('/')}/health"):  # its client would try for minutes
        raise LewisError("MLflow does not answer")
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        events = of_prefect.released(client, now - REMEMBERED)
    seen = [
        Release(str(told.get("recipe")), str(told.get("ref")), str(told.get("new")), event.occurred)
        for event, told in ((event, event.payload) for event in events)
    ]
    version, behind, took = (dict[tuple[str, ...], float]() for _ in range(3))
    for recipe in recipes_folder.names():
        if not (model := recipes_folder.registered_name(recipe)):
            continue
        mine = [release for release in seen if release.recipe == recipe]
        held = releases.merged(model) if tracking.exists() else []  # a look should not create a database
        champion = next((version for version in held if "champion" in version.aliases), None)
        behind[recipe, model] = _behind(mine, champion, now)
        if champion is not None:
            version[recipe, model] = float(champion.version)
            if (seconds := _took(mine, champion, _promoted(model, champion.version))) is not None:
                took[recipe, model] = seconds
    labels = ["recipe", "model"]
    yield of_prefect.gauge("lewis_champion_version", "The version in use.", labels, version)
    about = "Seconds since which the champion misses a release that was seen in the last 7 days; 0 if it has them all."
    yield of_prefect.gauge("lewis_champion_behind_seconds", about, labels, behind)
    about = "From the newest release in the champion to when it became that; left out if that release is not known."
    yield of_prefect.gauge("lewis_release_to_champion_seconds", about, labels, took)


def _behind(seen: Sequence[Release], champion: releases.Held | None, now: datetime) -> float:
    """Seconds since the first release that the champion misses; the newest of each reference counts."""
    since = now
    for ref in {release.ref for release in seen}:
        for release in sorted((each for each in seen if each.ref == ref), key=lambda each: each.time, reverse=True):
            if _holds(champion, release):
                break
            since = min(since, release.time)
    return (now - since).total_seconds()


def _took(seen: Sequence[Release], champion: releases.Held, promoted: datetime | None) -> float | None:
    times = [release.time for release in seen if _holds(champion, release)]
    times = [time for time in times if promoted is not None and time <= promoted]
    return (promoted - max(times)).total_seconds() if promoted is not None and times else None


def _holds(champion: releases.Held | None, release: Release) -> bool:
    """Whether a champion was merged from the commit of a release; of `base+adapter` the event may name one part."""
    held = champion.commit_of(release.ref) if champion else None
    return held is not None and (held == release.new or release.new in commits_of(held))


def _promoted(model: str, version: str) -> datetime | None:
    records = [each for each in history.history(model) if each.version.rpartition("/")[2] == version]
    moved = [each for each in records if each.what not in history.REFUSED]
    return datetime.fromisoformat(moved[-1].time) if moved else None
