"""The page of metrics: the numbers of all sources, in Prometheus's text format.

A scrape asks each source in a thread of its own, and no more often than the source can bear. It waits at most
`PATIENCE` seconds for all of them, and gives the newest answer of each.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from lewis import settings, store
from lewis.redact import printable, redacted
from lewis.store import size
from lewis_flows import polls
from lewis_flows.service.metrics import of_prefect, of_registry
from lewis_flows.service.metrics.of_prefect import gauge

logger = logging.getLogger("lewis.webhook")
PATIENCE = 0.3  # seconds that a scrape waits for all sources; what they say later is on the next page
FORGET = 600.0  # seconds after which numbers of a source that no longer answers are left out


class Source:
    """One source of metrics, with its newest answer; threads may share it."""

    def __init__(self, name: str, read: Callable[[], Iterable[Metric]], kept: float) -> None:
        """Describe the source; nothing is asked yet.

        Args:
            name: value of the label `source`.
            read: asks the source; any exception means that there is no answer.
            kept: seconds after a question in which the source is not asked again.
        """
        self.name, self._read, self._kept = name, read, kept
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None
        self._found: list[Metric] = []
        self._time, self._tried = float("-inf"), float("-inf")  # when the last answer came, and when it was last asked
        self._wrong = ""

    @property
    def up(self) -> bool | None:
        """Whether the last question was answered; False if one is open for long; None before the first answer."""
        if self._running and time.monotonic() > self._tried + self._forgotten:
            return False
        return not self._wrong if self._wrong or self._time > float("-inf") else None

    def ask(self) -> None:
        """Start a thread that asks the source, unless it is being asked or was asked less than `kept` seconds ago."""
        with self._lock:
            if self._running is None and time.monotonic() >= self._tried + self._kept:
                self._tried = time.monotonic()
                self._running = threading.Thread(target=copy_context().run, args=(self._refresh,), daemon=True)
                self._running.start()

    def latest(self, patience: float) -> list[Metric]:
        """Return the newest numbers, after at most `patience` seconds; none older than `FORGET` and twice `kept`."""
        if running := self._running:
            running.join(patience)
        return self._found if time.monotonic() < self._time + self._forgotten else []

    @property
    def _forgotten(self) -> float:
        return max(FORGET, 2 * self._kept)

    def _refresh(self) -> None:
        wrong = ""
        try:
            self._found = list(self._read())
            self._time = time.monotonic()
        except Exception as error:  # one failing source must not hide the others
            wrong = redacted(f"{type(error).__name__}: {error}")
        if wrong != self._wrong:
            told = f"metrics of {self.name}: {wrong or 'they can be read again'}"
            logger.log(logging.WARNING if wrong else logging.INFO, "%s", printable(told))
        self._wrong = wrong
        with self._lock:
            self._running = None


def default_sources() -> list[Source]:
    """Return the sources of the receiver: the last poll, Prefect's server, the registry, and this machine's store."""
    return [
        Source("poll", _polls, 0.0),
        Source("prefect", of_prefect.Prefect().read, 15.0),
        Source("mlflow", of_registry.read, 60.0),
        Source("store", _store, 300.0),
    ]


class Page(Collector):
    """The page of metrics of several sources, as a collector of Prometheus's library; threads may share it."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return the page in Prometheus's text format 0.0.4."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Return nothing, since registering the collector must not ask the sources."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask all sources at the same time, and yield their metrics, and whether each one answers if that is known."""
        for source in self._sources:
            source.ask()
        answers, until = dict[tuple[str, ...], float](), time.monotonic() + PATIENCE
        for source in self._sources:
            yield from source.latest(max(0.0, until - time.monotonic()))
            if source.up is not None:
                answers[source.name,] = float(source.up)
        yield gauge("lewis_source_up", "Whether what the numbers come from answers.", ["source"], answers)


def _polls() -> Iterator[Metric]:
    """Yield what polls noted in the store; they compare the Hub and local folders with the champions' commits."""
    now = datetime.now(UTC)
    if last := polls.last():
        age = {(): (now - last.time).total_seconds()}
        yield gauge("lewis_last_poll_age_seconds", "Seconds since the last poll of all recipes ended.", [], age)
        wrong = {(name,): 1.0 for name in last.problems}
        about = "1 for a recipe that the last poll could not check; with an empty name, if it could check none."
        yield gauge("lewis_poll_problem", about, ["recipe"], wrong)
    for metric, which, times in (
        ("lewis_champion_behind_seconds", "first", polls.behind_since()),
        ("lewis_newest_missed_seconds", "last", polls.newest_missed()),
    ):
        lag = {(name,): (now - when).total_seconds() if when else 0.0 for name, when in times.items()}
        about = f"Seconds since the {which} commit was seen that the champion was not merged from; 0 if there is none."
        yield gauge(metric, about, ["recipe"], lag)


def _store() -> Iterator[Metric]:
    """Yield the size of this machine's store by folder, its free space, and its quota if there is one."""
    folders: dict[tuple[str, ...], float] = {(name,): count for name, count in size.by_folder().items()}
    yield gauge("lewis_store_bytes", "Bytes on disk in the store, by folder.", ["folder"], folders)
    free = store.free_space(store.home())
    yield gauge("lewis_store_free_bytes", "Bytes that may still be written to the store.", [], {(): free})
    if (quota := settings.QUOTA.get()) is not None:
        yield gauge("lewis_store_quota_bytes", "How large the store may be, LEWIS_QUOTA.", [], {(): quota})
