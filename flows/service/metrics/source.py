"""A place that numbers come from: asked at a scrape, not more often than it can bear, and never waited for too long."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextvars import copy_context

from prometheus_client.core import Metric

from lewis.redact import printable, redacted

logger = logging.getLogger("lewis.webhook")
PATIENCE = 8.0  # seconds that a scrape waits for one source; Prometheus itself waits for ten
FORGET = 600.0  # seconds after which numbers of a source that no longer answers are left out


class Source:
    """Numbers of one origin; threads may share it."""

    def __init__(self, name: str, read: Callable[[], Iterable[Metric]], kept: float) -> None:
        """Describe the source; nothing is asked yet.

        Args:
            name: for the label `source`.
            read: asks it; whatever it raises means that there is no answer.
            kept: seconds for which an answer is given again.
        """
        self.name, self._read, self._kept = name, read, kept
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None
        self._found: list[Metric] = []
        self._time, self._tried = float("-inf"), float("-inf")  # of the last answer, and of the last question
        self._wrong = ""

    @property
    def up(self) -> bool:
        """Whether the last question was answered."""
        return not self._wrong and self._time > float("-inf")

    def ask(self) -> None:
        """Begin to ask it anew, unless its answer is young or it is being asked."""
        with self._lock:
            if self._running is None and time.monotonic() >= self._tried + self._kept:
                self._tried = time.monotonic()
                self._running = threading.Thread(target=copy_context().run, args=(self._refresh,), daemon=True)
                self._running.start()

    def latest(self) -> list[Metric]:
        """The newest numbers, after at most `PATIENCE` seconds; none if the last answer is older than `FORGET`."""
        if running := self._running:
            running.join(PATIENCE)
        return self._found if time.monotonic() < self._time + max(FORGET, 2 * self._kept) else []

    def _refresh(self) -> None:
        wrong = ""
        try:
            self._found = list(self._read())
            self._time = time.monotonic()
        except Exception as error:  # a part that does not answer takes the numbers of no other with it
            wrong = redacted(f"{type(error).__name__}: {error}")
        if wrong != self._wrong:
            told = f"metrics of {self.name}: {wrong or 'they can be read again'}"
            logger.log(logging.WARNING if wrong else logging.INFO, "%s", printable(told))
        self._wrong = wrong
        with self._lock:
            self._running = None
