"""What the last poll found, as the store keeps it."""

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ValidationError

from lewis import store

RETRY_AFTER = timedelta(hours=1)
"""After a failed run, its release is announced again."""


class Poll(BaseModel):
    """The last poll.

    Attributes:
        time: when it ended, UTC.
        checked: how many recipes it compared with the registry.
        problems: recipe -> why it could not be checked; under an empty name, why none could.
    """

    time: datetime
    checked: int = 0
    problems: dict[str, str] = {}


def last() -> Poll | None:
    """The last poll of all recipes; None if there was none."""
    try:
        return Poll.model_validate(store.read_json(_path()))
    except ValidationError:
        return None


def remember(checked: int, problems: dict[str, str]) -> bool:
    """Store what a poll found. Returns whether its problems differ from those of the poll before."""
    before = last()
    store.write_json(_path(), Poll(time=datetime.now(UTC), checked=checked, problems=problems).model_dump(mode="json"))
    return problems != (before.problems if before else {})


def _path() -> Any:
    return store.home() / "last-poll.json"
