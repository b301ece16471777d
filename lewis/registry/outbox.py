"""The outbox: moves of the alias `champion` that are still to be reported to Prefect.

A process may die after it moved the alias and before it reported that, and the server may die after the report. So
a move is written to a file of the store before the alias moves, and the file stays until the reader of the outbox has
made sure that the server knows the move. A move has one id, however often it is reported.

The alias may not have moved although the move was written: the writer may have died in between. `settle` finds that out
from the alias. Until then, the move is neither reported nor removed.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lewis import store
from lewis.store.kinds import OUTBOX


@dataclass(frozen=True)
class Move:
    """A move of the alias `champion` of a registered model to another version.

    Attributes:
        name: of the registered model.
        version: the new champion's number.
        previous: `uri` of the champion before; None if there was none.
        reasons: the gate's, or a person's.
        about: further data to report with it, such as the recipe; JSON data.
        id: a UUID, the same whenever the move is reported.
        time: when it was written down; UTC, ISO 8601.
        happened: whether the alias is known to have moved.
    """

    name: str
    version: str
    previous: str | None
    reasons: Sequence[str]
    about: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    happened: bool = False

    @property
    def uri(self) -> str:
        """`models:/name/version` of the new champion."""
        return f"models:/{self.name}/{self.version}"


def write(move: Move) -> None:
    """Write a move to a file, in place of an earlier one of the same id; remove leftovers of processes that died."""
    path = OUTBOX.path(move.id)
    store.write_entry(path, asdict(move))
    store.sweep(path.parent)


def remove(move: Move) -> None:
    """Remove a move from the outbox, because Prefect knows it or it never happened."""
    OUTBOX.path(move.id).unlink(missing_ok=True)


def moves() -> list[Move]:
    """Return all moves in the outbox, oldest first."""
    found = [store.read_entry(path) for path in OUTBOX.entries()]
    return sorted((Move(**each) for each in found if each), key=lambda move: move.time)


def unsettled() -> list[str]:
    """The registered models that have moves which may or may not have happened."""
    return sorted({move.name for move in moves() if not move.happened})


def settle(name: str, champion: str | None) -> None:
    """Find out which of a model's moves happened. Call it under the registry's lock, before the alias moves again.

    Args:
        name: of the registered model.
        champion: the version that the alias points to now; None if there is none.
    """
    for move in moves():
        if move.name != name or move.happened:
            continue
        if move.version == champion:
            write(replace(move, happened=True))
        else:
            remove(move)
