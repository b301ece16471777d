"""The note that `lewis up` keeps in the store while it runs: its process, and the URL of each part."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lewis import store
from lewis.store.folders import SERVICE_NOTE


def read() -> dict[str, Any]:
    """Return the note; empty if there is none, or its `lewis up` was killed, also by a restart of this host.

    It has the keys `pid`, `writer` and `system` (see `store.writer` and `store.system`), `prefect`, `mlflow` and
    `webhook`; `champion` with `--serve`; `mlflow_user` if `lewis up` started an MLflow server that asks for a password;
    `database_of` each server that it started.
    """
    known: dict[str, Any] = store.read_json(_path()) or {}
    # Another process may answer there now, and must not get our key. A writer elsewhere counts as alive.
    if store.has_restarted(str(known.get("system"))) or store.is_dead(str(known.get("writer")), _path() / "-"):
        return {}
    return known


def write(known: Mapping[str, str]) -> None:
    """Write the note: where the parts of this process answer, and MLflow's user, for other commands of this store."""
    store.write_json(_path(), {**known, "pid": os.getpid(), "writer": store.writer(), "system": store.system()})


def database_of(part: str) -> str:
    """Return the note's key for the place of the database of a server, `prefect` or `mlflow`."""
    return f"{part}_database"


def remove() -> None:
    """Remove the note, if there is one."""
    _path().unlink(missing_ok=True)


def _path() -> Path:
    return store.home() / SERVICE_NOTE
