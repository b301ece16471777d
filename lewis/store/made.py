"""Which entries a block of code made, as opposed to those that it found or fetched."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_making: ContextVar[list[Path] | None] = ContextVar("making", default=None)


@contextmanager
def noticing() -> Iterator[list[Path]]:
    """Give a list that every entry which this block publishes in this thread is appended to."""
    made = list[Path]()
    token = _making.set(made)
    try:
        yield made
    finally:
        _making.reset(token)


def note(path: Path) -> None:
    """Say that an entry was made."""
    if (made := _making.get()) is not None:
        made.append(path)
