"""Which version replaced which as champion, and why: an append-only list in the tags of the registered model.

`lewis.registry.promotion` writes a record before it moves the alias. If it dies in between, the next run moves the
alias without a second record.
"""

import getpass
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

from lewis.errors import InputError
from lewis.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

TAG = "lewis.registry.history."
TEAM = "lewis.team"  # tag of a registered model, and of its versions: `register.team`
REFUSED = ("rejected", "refused", "waits", "lapsed")
"""What records say that left the champion where it was."""


@dataclass(frozen=True)
class Record:
    """One event in the life of a registered model.

    Attributes:
        time: UTC, ISO 8601.
        what: `promoted`, `rejected`, `promoted by hand`, `rolled back`; `waits` for approval, `approved`, `refused` by
            hand, or `lapsed` because nobody did in time; or `repaired`: the same merge, registered anew because the
            champion's files were damaged.
        version: the new champion, or the version that was refused.
        champion: the version that was in use before; None if there was none.
        why: the gate's rules, or a person's reason.
        by: the user, or the run.
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
    name = tracking.model_name(name)
    with tracking.client(f"reading the history of {name}") as client:
        return read(client, name)


def record(
    client: "MlflowClient", name: str, what: str, version: str, champion: str | None, why: str, by: str = ""
) -> None:
    """Append a record, unless the newest record says the same. Call it under the registry's lock."""
    new = Record(datetime.now(UTC).isoformat(), what, version, champion, why, by or getpass.getuser())
    known = read(client, name)
    if known and (known[-1].what, known[-1].version, known[-1].champion) == (what, version, champion):
        return
    text = json.dumps(asdict(new), ensure_ascii=False)
    client.set_registered_model_tag(name, f"{TAG}{new.time.replace(':', '.')[:26]}-{uuid4().hex[:4]}", text)


def lines(records: Sequence[Record]) -> list[str]:
    """Records as a line each, newest first: when, what, which version in place of which, why, by whom."""
    numbered = [(each, f"v{each.version.rpartition('/')[2]}") for each in reversed(records)]
    return [
        f"{each.time[:16].replace('T', ' ')}  {each.what:<16} {version:<5} {_beside(each):<16} "
        f"{' '.join(each.why.split())} ({each.by})"
        for each, version in numbered
    ]


def _beside(record: Record) -> str:
    """What a version has to do with the champion before."""
    if record.champion is None:
        return "" if record.what in REFUSED else "the first"
    before = f"v{record.champion.rpartition('/')[2]}"
    return f"{before} stays" if record.what in REFUSED else f"in place of {before}"


def read(client: "MlflowClient", name: str) -> list[Record]:
    """`history`, with a client that is open already."""
    tags = registered_model(client, name).tags
    return [Record(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(TAG)]


def registered_model(client: "MlflowClient", name: str) -> "RegisteredModel":
    """A registered model.

    Raises:
        InputError: if there is no model of this name.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise InputError(f"{name}: MLflow has no registered model of this name") from error
        raise
