"""Numbers of the last poll, which compares the Hub and local folders with what the champions hold."""

from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client.core import Metric

from lewis_flows import behind, polls
from lewis_flows.service.metrics.of_prefect import gauge


def read() -> Iterator[Metric]:
    """Read what the poll left in the store."""
    now = datetime.now(UTC)
    if last := polls.last():
        age = {(): (now - last.time).total_seconds()}
        yield gauge("lewis_last_poll_age_seconds", "Seconds since the last poll of all recipes ended.", [], age)
        wrong = {(name,): 1.0 for name in last.problems}
        about = "1 for a recipe that the last poll could not check; with an empty name, if it could check none."
        yield gauge("lewis_poll_problem", about, ["recipe"], wrong)
    lag = {(name,): (now - since).total_seconds() if since else 0.0 for name, since in behind.since().items()}
    about = "Seconds since a model moved that the champion was not merged from; 0 if it holds the newest of all."
    yield gauge("lewis_champion_behind_seconds", about, ["recipe"], lag)
