"""Approval by a person: which version waits for it, until when, and what must still be true then."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from lewis.errors import InputError
from lewis.evaluation.gate import Verdict
from lewis.registry import history
from lewis.registry.versions import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient

WAITING = "waiting"
"""The verdict of a version that passed and is not approved yet."""

_UNTIL, _BESIDE = "lewis.approve_until", "lewis.approve_beside"
"""Tags of such a version: until when it waits (UTC, ISO 8601), and what the gate compared it with."""


def ask(client: "MlflowClient", version: Version, verdict: Verdict, champion: str | None, by: str) -> dict[str, str]:
    """The tags of a version that begins to wait, or waits already; that its time was up before goes to the history.

    Args:
        verdict: of the gate, just now.
        champion: `uri` of the version in use; None if there is none.
        by: who ran the gate, for the history.
    """
    known = dict(client.get_model_version(version.name, version.version).tags)
    now = datetime.now(UTC)
    if known.get("lewis.verdict") == WAITING and _UNTIL in known:
        same = known.get(_BESIDE) == verdict.compared_with
        if same and datetime.fromisoformat(known[_UNTIL]) > now:
            return {}
        why = "nobody approved it in time" if same else f"it was compared with {known.get(_BESIDE)}"
        history.record(client, version.name, "lapsed", version.uri, champion, why, by)
    until = now + timedelta(hours=verdict.approve_hours or 0)
    return {_UNTIL: until.isoformat(timespec="seconds"), _BESIDE: verdict.compared_with}


def waiting(client: "MlflowClient", name: str, version: str) -> dict[str, str]:
    """The tags of a version that waits.

    Raises:
        InputError: if it does not.
    """
    from mlflow.exceptions import MlflowException

    uri = f"models:/{name}/{version}"
    try:
        tags = dict(client.get_model_version(name, version).tags)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise InputError(f"{uri}: no such version; see `lewis history {name}`") from error
        raise
    if tags.get("lewis.verdict") != WAITING:
        told = tags.get("lewis.verdict") or "none yet"
        raise InputError(f"{uri}: it waits for no approval, its verdict is: {told}; see `lewis history {name}`")
    return tags


def check(client: "MlflowClient", name: str, version: str, champion: str | None) -> None:
    """Check that a version waits, and that what the gate found still holds.

    Args:
        champion: the version in use now; None if there is none.

    Raises:
        InputError: if not.
    """
    uri, tags = f"models:/{name}/{version}", waiting(client, name, version)
    again = "run its recipe again, which judges it anew"
    until = datetime.fromisoformat(tags[_UNTIL])
    if until < datetime.now(UTC):
        raise InputError(f"{uri}: it waited for approval until {until:%Y-%m-%d %H:%M} UTC; {again}")
    compared, now = tags[_BESIDE], f"models:/{name}/{champion}" if champion else None
    if now != (compared if compared.startswith("models:/") else None):
        raise InputError(f"{uri}: the gate compared it with {compared}, but the champion is {now} by now; {again}")
