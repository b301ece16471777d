"""What the tasks share: records of results, the retry rule, progress in the UI, filters of their log."""

import json
import logging
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.serializers import JSONSerializer
from prefect.tasks import exponential_backoff
from pydantic import Field

from lewis import settings, store
from lewis.errors import LewisError
from lewis.models.hub.errors import retryable
from lewis.redact import redact_logs, redacted
from lewis.registry.tracking import AwayError
from lewis.store import kinds, sealed_json
from lewis.store.kinds import Kind
from lewis.store.writable import of_the_disk

logger = logging.getLogger(__name__)
REMIND = 60.0  # seconds between two lines of the log about one wait
STOPPING = threading.Event()
"""Set on Ctrl-C or when the run is cancelled. Long tasks, in threads that cannot be interrupted, end when they report
progress."""
# For errors that can pass by themselves: five tries in about a minute. A wrong input is not tried again.
RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": lambda task, run, state: _heals(state.result(raise_on_failure=False)),
}


def _heals(error: BaseException) -> bool:
    """Return whether to retry after an error; if a server is away, first wait, up to `LEWIS_SERVER_WAIT_SECONDS`."""
    if not isinstance(error, AwayError):
        return retryable(error)
    server, begin, limit, told = redacted(error.url), time.monotonic(), settings.SERVER_WAIT.get(), float("-inf")
    while not error.answers():
        waited = time.monotonic() - begin
        if waited >= limit or STOPPING.is_set():
            return False
        if waited - told >= REMIND:
            logger.warning("%s does not answer since %.0f s; waiting for it, at most %d s", server, waited, limit)
            told = waited
        time.sleep(1)
    logger.warning("%s answers again, after %.0f s", server, time.monotonic() - begin)
    return True


class RecordSerializer(JSONSerializer):
    """Prefect's JSON serializer of task results, which adds a checksum to each record."""

    type: str = Field(default="lewis-record", frozen=True)

    def dumps(self, obj: Any) -> bytes:
        """Return the record of a task's result."""
        return sealed_json.dumps({"result": json.loads(super().dumps(obj))}, indent=None).encode()

    def loads(self, blob: bytes) -> Any:
        """Return the result of a record.

        Raises:
            ValueError: if the record, or a file that the result refers to, is damaged; or if another version of LEWIS
                wrote the record, with a class that this one does not have: Prefect would give its fields as a dict.
        """
        found = super().loads(json.dumps(sealed_json.loads(blob)["result"]).encode())
        for each in found if isinstance(found, list) else [found]:
            if isinstance(each, dict) and "__class__" in each:
                raise ValueError(f"this LEWIS has no class {each['__class__']}")
        return found


_PATHS = ("path", "folder", "adapter", "base", "statistics")  # fields of references that are paths


def _content(record: bytes) -> dict[str, Any]:
    """Return a record's content as plain data, not as a reference, which would be marked as used; fail if damaged."""
    return sealed_json.loads(json.loads(record)["result"].encode())


def _paths(reference: Any) -> Iterator[str]:
    """The paths in the fields of a reference, and of the references in it."""
    if isinstance(reference, list):
        for each in reference:
            yield from _paths(each)
    elif isinstance(reference, dict):
        for name, value in reference.items():
            if name == "sizes" and "folder" in reference:  # of a model; an expert may have this name, too
                yield from value
            elif name in _PATHS and isinstance(value, str):
                yield value
            else:
                yield from _paths(value)


def _targets(record: Path) -> list[Path]:
    """The files and folders that a record refers to; none if LEWIS did not write it."""
    try:
        found = _content(record.read_bytes())["result"]
        named = [name for each in (found if isinstance(found, list) else [found]) for name in _paths(each["data"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [Path(name) for name in named if name]


# Files outside the store do not note their use.
RESULTS = kinds.add(Kind("results", "*", check=_content, notes_use=False, refers_to=_targets))
"""Prefect's records of finished tasks: a file for each key, worthless once a file that it refers to is removed."""


def raise_if_stopping(what: str) -> None:
    """End a task if the process got the signal to stop.

    Raises:
        LewisError: if it did; the message begins with `what`.
    """
    if STOPPING.is_set():
        raise LewisError(f"{what}: stopped")


class Progress:
    """A `lewis.progress.Report` of a long task: an artifact in the UI and a line in the log, every two seconds."""

    def __init__(self, key: str, about: str) -> None:
        """Show the progress of the task run `about`; `key` is the prefix of the artifact's key: recipe and step."""
        self._key, self._about, self._last = f"{key}-progress", about, time.monotonic()
        self._artifact: UUID | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report `done` of `total` units.

        Raises:
            LewisError: if the process got the signal to stop.
        """
        raise_if_stopping(self._about)
        if time.monotonic() - self._last < 2 and (done < total or self._artifact is None):
            return
        self._last = time.monotonic()
        percent = round(100 * done / max(total, 1), 1)
        if self._artifact is None:
            made = create_progress_artifact(progress=percent, key=self._key, description=self._about)
            assert isinstance(made, UUID)  # not awaitable, as there is no event loop here
            self._artifact = made
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)
        logger.info("%s: %.0f %%", self._about, percent)


def slug(text: str) -> str:
    """Reduce a text to lower-case letters, digits and dashes, the characters allowed in the keys of artifacts.

    A text in another script than Latin gets a short digest, by which it differs from others.
    """
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).split("-")
    plain = "-".join(word for word in words if word) or "x"
    return f"{plain}-{store.digest(text.lower())[:6]}" if beyond_latin(text) else plain


def beyond_latin(text: str) -> bool:
    """Whether a text has letters or digits of another script than Latin, of which no key keeps anything."""
    return any(c.isalnum() and not unicodedata.name(c, "").startswith(("LATIN", "DIGIT")) for c in text)


def quieten() -> None:
    """Let the packages of LEWIS log at INFO, and remove noise and passwords from all logs."""
    redact_logs()
    for library in ("lewis", "lewis_tasks", "lewis_flows"):
        logging.getLogger(library).setLevel(logging.INFO)
    for runs in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(runs).addFilter(worth_reading)
    # Prefect's client of events connects again by itself.
    logging.getLogger("websockets.client").addFilter(lambda record: record.msg != "keepalive ping failed")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each attempt to reach MLflow
    logging.getLogger("mlflow.store.db.utils").addFilter(without_traceback)  # the error is raised again and logged


def worth_reading(record: logging.LogRecord) -> bool:
    """Filter Prefect's log records of runs: False drops the record.

    The traceback of a LewisError, or of a full or read-only disk, is dropped, since the message says what went wrong.
    Prefect's warning that a timeout stops a thread only between calls is dropped, since the threads of LEWIS loop over
    tensors and batches, and lm-eval runs in a child process.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, LewisError) or of_the_disk(error):
        without_traceback(record)
    return not record.getMessage().startswith("Timeout of ")


def without_traceback(record: logging.LogRecord) -> bool:
    """Filter log records: keep the record, without its traceback."""
    record.exc_info = record.exc_text = None
    return True


quieten()
