"""Notes of what works on the store, `runs/<name>`: what was used since the oldest of them was made is not removed.

Each is locked by its process, and the kernel frees the lock when that dies.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lewis.store import files

_LIBRARY = "library-"  # how notes of merges without Prefect begin


@contextmanager
def noted() -> Iterator[None]:
    """Leave a note for a block of the library, and remove those that killed processes left."""
    for note in notes():
        if note.name.startswith(_LIBRARY) and is_dead(note.name):
            forget(note.name)
    name = f"{_LIBRARY}{uuid.uuid4().hex}"
    with lock(name):
        with suppress(OSError):  # a full disk stops only what needs more room than this
            files.write_text(note_of(name), "")
        try:
            yield
        finally:
            forget(name)


def lock(name: str) -> FileLock:
    """What a process holds while its note says that it works."""
    return files.lock(f"run-{name}")


def note_of(name: str) -> Path:
    """Where the note of a run is, whether or not it exists."""
    return files.home() / "runs" / name


def notes() -> list[Path]:
    """All notes, also those of processes that have died."""
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
        dead: whether those count, too, that died and whose notes nobody has removed yet.
    """
    began = []
    for note in notes():
        with suppress(FileNotFoundError):  # it has just ended
            if dead or not is_dead(note.name):
                began.append(note.stat().st_mtime)
    return min(began, default=None)
