"""Where servers of this machine keep their data: a file of SQLite, or a server that a variable names."""

import os
import re
from pathlib import Path

from lewis import store
from lewis.redact import redacted
from lewis.registry import tracking

_PREFECT = (
    *("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"),
    *("PREFECT_SERVER_DATABASE_HOST", "PREFECT_API_DATABASE_HOST"),
)
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")


def prefect() -> Path | str:
    """The database of a Prefect server that is started here: its file, or the URL of a server, without a password."""
    home = os.environ.get("PREFECT_HOME") or store.home() / "prefect"
    given = next(filter(None, map(os.environ.get, _PREFECT)), "")
    return _place(given) if given else _absolute(Path(home).expanduser() / "prefect.db")


def mlflow() -> Path | str:
    """The database of MLflow: its file, or the URL of a server, without a password."""
    return _place(os.environ.get("MLFLOW_TRACKING_URI") or tracking.database())


def _place(url: str) -> Path | str:
    return _absolute(found["path"]) if (found := _SQLITE.match(url)) else redacted(url)


def _absolute(path: Path | str) -> Path:
    return Path(os.path.abspath(path))
