"""Who replaced whom as champion, and why: an append-only list in the tags of the registered model.

A record is written before the alias moves, and not again by the run that heals one which died in between.
"""

import getpass
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

from lewis import registry, store, tracking
from lewis.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

TAG = "lewis.history."
WITHDRAWN = "lewis.withdrawn"  # tag of a version that was rolled back by hand: why


@dataclass(frozen=True)
class Record:
    """One event in the life of a registered model.

    Attributes:
        time: UTC, ISO 8601.
        what: `promoted`, `rejected`, `promoted by hand` or `rolled back`.
        version: the version it is about: the new champion, or the one that was refused.
        champion: the version that was in use before; None if there was none.
        why: the gate's rules, or what a person said.
        by: who did it.
    """

    time: str
    what: str
    version: str
    champion: str | None
    why: str
    by: str


def history(name: str) -> list[Record]:
    """All records of a registered model, oldest first.

    Raises:
        InputError: if there is no such model.
    """
    name = registry.model_name(name)
    with tracking.client(f"reading the history of {name}") as client:
        return _read(client, name)


def promote(name: str, version: str, why: str) -> str:
    """Make a version the champion by hand; gives the `uri` that it replaced, or an empty text.

    Raises:
        InputError: if there is no such version, its files are gone, or it is the champion already.
    """
    name = registry.model_name(name)
    with store.lock(f"registry-{name}"), tracking.client(f"promoting {name}/{version}") as client:
        return _move(client, name, version, "promoted by hand", why)


def rollback(name: str, why: str) -> str:
    """Put the previous champion back; gives its `uri`. No gate promotes the withdrawn version again.

    Raises:
        InputError: if there is no previous champion, or its files are gone.
    """
    name = registry.model_name(name)
    with store.lock(f"registry-{name}"), tracking.client(f"rolling back {name}") as client:
        aliases = _aliases(client, name)
        current, previous = aliases.get("champion"), aliases.get("previous")
        if current is None or previous is None or current == previous:
            raise InputError(f"{name}: there is no previous champion to go back to; see `lewis history {name}`")
        _move(client, name, previous, "rolled back", why)
        client.set_model_version_tag(name, current, WITHDRAWN, why)
        return f"models:/{name}/{previous}"


def withdrawn(name: str, digest: str) -> str | None:
    """Why the version of a merge was rolled back by hand; None if it was not."""
    found = registry.find(name, digest)
    if found is None:
        return None
    with tracking.client(f"reading {found.uri}") as client:
        return dict(client.get_model_version(found.name, found.version).tags).get(WITHDRAWN)


def record(
    client: "MlflowClient", name: str, what: str, version: str, champion: str | None, why: str, by: str = ""
) -> None:
    """Append a record, unless it says what the newest one says. To be called under the registry's lock."""
    new = Record(datetime.now(UTC).isoformat(), what, version, champion, why, by or getpass.getuser())
    known = _read(client, name)
    if known and (known[-1].what, known[-1].version, known[-1].champion) == (what, version, champion):
        return
    text = json.dumps(asdict(new), ensure_ascii=False)
    client.set_registered_model_tag(name, f"{TAG}{new.time.replace(':', '.')[:26]}-{uuid4().hex[:4]}", text)


def rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """Records as rows of a table, newest first."""
    return [
        {
            "when": each.time[:19].replace("T", " "),
            "what": each.what,
            "version": each.version,
            "champion before": each.champion or "none",
            "why": each.why,
            "by": each.by,
        }
        for each in reversed(records)
    ]


def _move(client: "MlflowClient", name: str, version: str, what: str, why: str) -> str:
    if not why.strip():
        raise InputError("--why: expected a reason, which `lewis history` will show")
    aliases = _aliases(client, name)
    current = aliases.get("champion")
    if version == current:
        raise InputError(f"models:/{name}/{version} is the champion already")
    if not registry.is_whole(client, name, version):
        raise InputError(
            f"models:/{name}/{version}: no such version, or its files are gone; see `lewis history {name}`"
        )
    before = f"models:/{name}/{current}" if current else None
    record(client, name, what, f"models:/{name}/{version}", before, why)
    if WITHDRAWN in client.get_model_version(name, version).tags:
        client.delete_model_version_tag(name, version, WITHDRAWN)
    if current:
        client.set_registered_model_alias(name, "previous", current)
    client.set_registered_model_alias(name, "champion", version)
    return before or ""


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in _model(client, name).aliases.items()}


def _read(client: "MlflowClient", name: str) -> list[Record]:
    tags = _model(client, name).tags
    return [Record(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(TAG)]


def _model(client: "MlflowClient", name: str) -> "RegisteredModel":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise InputError(f"{name}: MLflow has no registered model of this name") from error
        raise
