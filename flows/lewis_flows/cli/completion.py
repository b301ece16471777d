"""Completions that a shell offers for arguments: recipes of the folder, registered models and their versions.

They must come within a moment, so neither Prefect nor MLflow is imported. After an error there are none.
"""

import json
import os
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import LewisError

_PATIENCE = 2.0  # seconds for one request
Offer = Callable[..., list[str]]


def recipes(**_: Any) -> list[str]:
    """Return the names of the recipes in the folder of recipes."""
    from lewis_flows import recipes_folder

    with suppress(LewisError):
        return recipes_folder.names()
    return []


def recipes_and_files(prefix: str, **_: Any) -> list[str]:
    """Return names of recipes, YAML files, and folders that may hold some, for a command that takes a path too."""
    from argcomplete.completers import FilesCompleter

    return [*recipes(), *FilesCompleter(("yaml", "yml"))(prefix)]


def models(**_: Any) -> list[str]:
    """Return the names of the registered models."""
    return sorted({name for name, _ in _versions()})


def models_and_versions(**_: Any) -> list[str]:
    """Return the names of the registered models, and `NAME/VERSION` of all their versions."""
    found = versions()
    return [*dict.fromkeys(each.rpartition("/")[0] for each in found), *found]


def versions(**_: Any) -> list[str]:
    """Return `NAME/VERSION` of all registered versions: by name, the newest first."""
    return [f"{name}/{number}" for name, number in sorted(_versions(), key=lambda each: (each[0], -each[1]))]


def _versions() -> list[tuple[str, int]]:
    import sqlite3  # here, as all commands import this module

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    try:
        if uri.startswith("http"):
            return _of_server(uri)
        default = store.home() / "mlflow" / "mlflow.db"
        file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else default
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return [(str(name), int(number)) for name, number in database.execute(_QUERY)]
    except (OSError, LewisError, sqlite3.Error, ValueError, KeyError):
        return []


_QUERY = "SELECT name, version FROM model_versions WHERE current_stage != 'Deleted_Internal'"


def _of_server(uri: str) -> list[tuple[str, int]]:
    import base64
    import urllib.parse
    import urllib.request

    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    user, password = (os.environ.get(name, "") for name in names)
    secret = base64.b64encode(f"{user}:{password}".encode()).decode()
    page = f"{uri.rstrip('/')}/api/2.0/mlflow/model-versions/search?{urllib.parse.urlencode({'max_results': 1000})}"
    request = urllib.request.Request(page, headers={"Authorization": f"Basic {secret}"} if user else {})
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        found = json.load(answer).get("model_versions", [])
    return [(str(each["name"]), int(each["version"])) for each in found]
