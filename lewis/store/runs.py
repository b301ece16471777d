"""Notes of processes that work on the store (`runs/<name>`); entries used since the oldest note are not removed.

Each note is locked by its process, and the kernel frees the lock when the process dies.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lewis.store import files

_LIBRARY = "library-"  # how notes of merges without Prefect begin
COMMAND = "command-"  # how notes of commands that run a flow begin
_AGAIN = 7 * 86400.0  # seconds from its begin in which a run that died is expected to be run again


@contextmanager
def noted(kind: str = _LIBRARY) -> Iterator[None]:
    """Keep a note while a block works on the store, and remove notes of its kind that killed processes left.

    Args:
        kind: how the note's name begins.
    """
    for note in notes():
        if note.name.startswith(kind) and is_dead(note.name):
            forget(note.name)
    name = f"{kind}{uuid.uuid4().hex}"
    with lock(name):
        with suppress(OSError):  # without a note the work goes on: a full disk may have room for it
            files.write_text(note_of(name), "")
        try:
            yield
        finally:
            forget(name)


def lock(name: str) -> FileLock:
    """Return the lock that a process holds while it works and its note counts."""
    return files.lock(f"run-{name}")


def note_of(name: str) -> Path:
    """Where the note of a run is, whether or not it exists."""
    return files.home() / "runs" / name


def notes() -> list[Path]:
    """Return the paths of all notes, also of processes that have died."""
    return [path for path in (files.home() / "runs").glob("*") if not path.name.startswith(".")]


def is_dead(name: str) -> bool:
    """Whether the process that made a note has died."""
    held = lock(name)
    try:
        held.acquire(timeout=0)
    except Timeout:
        return False
    held.release()
    return True


def forget(name: str) -> None:
    """Remove a note and its lock."""
    note_of(name).unlink(missing_ok=True)
    Path(lock(name).lock_file).unlink(missing_ok=True)


def active_since(*, dead: bool = False) -> float | None:
    """When the oldest process that works on the store began (Unix time, seconds); None if none does.

    Args:
        dead: whether processes count, too, that began in the last week, have died, and whose notes are not removed yet.
    """
    began, old = [], time.time() - _AGAIN
    for note in notes():
        with suppress(FileNotFoundError):  # it has just ended
            since = note.stat().st_mtime
            if (dead and since > old) or not is_dead(note.name):
                began.append(since)
    return min(began, default=None)
