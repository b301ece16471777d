"""Logs as one JSON object per line, for a collector of logs: `LEWIS_LOG_FORMAT=json`.

    {"time": "2026-01-01T03:00:01.205+00:00", "level": "INFO", "logger": "lewis.models.hub.repository", "line": "..."}

Next to these four, a line of a run has `flow_run` and `task_run` (their ids), and an error its traceback as `error`.
`lewis up`, which prints the lines of several parts, adds `part`.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from lewis import settings
from lewis.redact import redacted

CONSOLE = "PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS"
"""Prefect's own setting of the class that prints its logs; it is read when Prefect is first imported."""


def is_json() -> bool:
    """Whether logs are to be printed as JSON objects.

    Raises:
        InputError: if `LEWIS_LOG_FORMAT` is neither `text` nor `json`.
    """
    return settings.LOG_FORMAT.get() == "json"


def prepare() -> None:
    """Make Prefect log in JSON if LEWIS does, here and in child processes, unless the environment says otherwise.

    Raises:
        InputError: as `is_json`.
    """
    if is_json():
        os.environ.setdefault(CONSOLE, f"{__name__}.{JsonLines.__name__}")


class JsonLines(logging.StreamHandler[TextIO]):
    """Log handler that prints JSON objects, whatever its formatter; takes the arguments of Prefect's own handler."""

    def __init__(self, stream: TextIO | None = None, styles: Any = None, level: int | str = logging.NOTSET) -> None:
        """Print to a stream; by default to what is stderr at each record."""
        super().__init__(stream)
        self._fixed = stream is not None and stream is not sys.stderr
        self.setLevel(level)

    def format(self, record: logging.LogRecord) -> str:
        """One record as JSON."""
        return line_of(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if not self._fixed:
            self.stream = sys.stderr
        super().emit(record)


def line_of(record: logging.LogRecord) -> str:
    """A record as JSON, without a line break and without passwords."""
    kind = {"prefect.flow_runs": "flow", "prefect.task_runs": "task"}.get(record.name)  # as in Prefect's text
    of_run = f"{kind.capitalize()} run {getattr(record, f'{kind}_run_name', '')!r} - " if kind else ""
    told: dict[str, str] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname,
        "logger": record.name,
        "line": of_run + record.getMessage(),
    }
    for key in ("flow_run", "task_run"):
        if given := str(getattr(record, f"{key}_id", "") or ""):
            told[key] = given
    if record.exc_info and record.exc_info[0]:
        told["error"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
    return json.dumps({key: redacted(text) for key, text in told.items()}, ensure_ascii=False)
