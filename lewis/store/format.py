"""The format of the store: which version of LEWIS may use it.

The file `format` in the store has a number. It is raised when a store of the version before can no longer be read as it
is; `_MIGRATIONS` then has what brings an older store up to date. What one step computes otherwise than before is no
matter of the format: such a step raises its own `SEMANTICS`, and finds no entry of the version before.
"""

import json
from collections.abc import Callable

from lewis.errors import InputError
from lewis.store import files
from lewis.store.folders import home

FORMAT = 1
_MIGRATIONS: dict[int, Callable[[], None]] = {}
"""Format -> what turns a store of it into one of the next format; it can be repeated after a kill."""


def check() -> None:
    """Bring a store of an older version up to date; a new one, and one without a number, is of the first format.

    Raises:
        InputError: if a newer version made it.
    """
    if (found := _read()) == FORMAT:
        return
    with files.lock("format"):
        found = _read()
        if found > FORMAT:
            raise InputError(
                f"LEWIS_HOME: the store {home()} has the format {found}, this version of LEWIS knows {FORMAT}: a newer "
                "version made it; install that, or set LEWIS_HOME to another folder"
            )
        for number in range(max(found, 1), FORMAT):
            _MIGRATIONS[number]()
            _write(number + 1)
        if found == 0:
            _write(FORMAT)


def _read() -> int:
    """The number; 0 without a file, or with one that is damaged."""
    found = files.read_json(home() / "format")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0


def _write(number: int) -> None:
    files.write_text(home() / "format", json.dumps(number) + "\n")
