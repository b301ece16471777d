"""Set an alias so that the webhooks of MLflow's registry fire, and move the alias `champion` so that it is reported.

An MLflow server sends the event `model_version_alias.created` only for requests that it handles itself. Processes open
the store's database without a server, so they send such requests to the server of `lewis up`, if one runs on the store
and has the same database.
"""

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lewis import store
from lewis.errors import InputError
from lewis.registry import outbox, tracking
from lewis.registry.outbox import Move
from lewis.store.folders import SERVICE_NOTE
from lewis.store.secrets import MLFLOW_PASSWORD

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)


def set_alias(client: "MlflowClient", name: str, alias: str, version: str) -> None:
    """Point an alias of a registered model to a version, through the server of its database if there is one."""
    if client.tracking_uri.startswith("http") or not _ask_server(client.tracking_uri, name, alias, version):
        client.set_registered_model_alias(name, alias, version)


def move_champion(client: "MlflowClient", move: Move, *, keeps_previous: bool = False) -> None:
    """Point the alias `previous` to the champion, and then the alias `champion` to another version.

    The move is written to the outbox first, so that it is reported even if this process dies. Call it under the
    registry's lock.

    Args:
        move: of the champion; its `previous` is the version that is the champion now.
        keeps_previous: whether `previous` stays where it is.
    """
    current = move.previous.rpartition("/")[2] if move.previous else None
    outbox.settle(move.name, current)
    outbox.write(move)
    if current is not None and not keeps_previous:
        set_alias(client, move.name, "previous", current)
    set_alias(client, move.name, "champion", move.version)
    outbox.write(replace(move, happened=True))


def _ask_server(database: str, name: str, alias: str, version: str) -> bool:
    """Have the server of `lewis up` set an alias, and return whether it did.

    Only a server that lives here is asked, and only if it has this database: in another one, the alias of another model
    of this name would move.
    """
    import requests

    note = store.read_json(store.home() / SERVICE_NOTE) or {}
    url, user = str(note.get("mlflow") or ""), note.get("mlflow_user")
    if urlsplit(url).hostname != "127.0.0.1" or not _lives_here(str(note.get("writer"))):
        return False
    if os.path.realpath(str(note.get("mlflow_database"))) != os.path.realpath(tracking.place_of(database)):
        return False
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy
            answer = session.post(
                f"{url}/api/2.0/mlflow/registered-models/alias",
                json={"name": name, "alias": alias, "version": version},
                auth=(str(user), MLFLOW_PASSWORD.read()) if user else None,
                timeout=30,
            )
        answer.raise_for_status()
    except (requests.RequestException, InputError) as error:
        logger.warning("the alias %s of %s is set without MLflow's server, so no webhook fires: %s", alias, name, error)
        return False
    return True


def _lives_here(writer: str) -> bool:
    """Whether the process that `store.writer` named is alive, on this machine and in this container."""
    place, _, number = writer.rpartition("-")
    try:
        os.kill(int(number), 0)
    except (OSError, ValueError, OverflowError):
        return False
    return place == store.writer().rpartition("-")[0]
