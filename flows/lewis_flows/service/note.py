"""The note that `lewis up` keeps in the store while it runs: its process, and the URL of each part."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lewis import store
from lewis.store.folders import SERVICE_NOTE


def read() -> dict[str, Any]:
    """The keys `pid`, `writer`, `prefect`, `mlflow` and `webhook`, with `--serve` `champion`; empty without a note.

    A killed `lewis up` leaves its note, which counts for none. `writer` names its process as `store.writer` does.

    `mlflow_user` is there too if `lewis up` started an MLflow server that asks for a password, and `database_of` each
    server that it started.
    """
    known: dict[str, Any] = store.read_json(_path()) or {}
    # Another process may answer there now, which must not get our key. A writer elsewhere cannot be asked.
    return {} if store.is_dead(str(known.get("writer")), _path() / "-") else known


def write(known: Mapping[str, str]) -> None:
    """Tell other commands of this store where the parts of this process answer, and MLflow's user."""
    store.write_json(_path(), {**known, "pid": os.getpid(), "writer": store.writer()})


def database_of(part: str) -> str:
    """The key that says where the server of a part, `prefect` or `mlflow`, has its database."""
    return f"{part}_database"


def remove() -> None:
    """Remove the note, if there is one."""
    _path().unlink(missing_ok=True)


def _path() -> Path:
    return store.home() / SERVICE_NOTE
