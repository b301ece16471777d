"""The log handler of Prefect's server, `Console`, which `PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS` names."""

import logging
import time
from typing import Any

from prefect.logging.handlers import PrefectConsoleHandler


class BusyDatabase(logging.Filter):
    """Drops Prefect's messages about a locked SQLite file, except for one an hour: Prefect tries again by itself.

    A request that met the lock is answered with 503, and the client asks again; the server's services try again in
    their next loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record; the first in an hour gets a text that says what to do, and no traceback."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None or "database is locked" not in str(error):
            return True
        if time.monotonic() - self._told < _QUIET:
            return False
        self._told = time.monotonic()
        record.msg, record.args, record.exc_info, record.exc_text = _LOCKED, (), None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


_QUIET = 3600.0  # seconds
_LOCKED = (
    "the database was locked for a moment, and Prefect tries again: this machine is busy; if that stays so, give it "
    "less to do, or Prefect a PostgreSQL (PREFECT_SERVER_DATABASE_CONNECTION_URL)"
)


_BUSY = BusyDatabase()  # one filter for all handlers: Prefect creates new handlers now and then


class Console(PrefectConsoleHandler):
    """Prefect's handler, without what `BusyDatabase` drops."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.addFilter(_BUSY)
