"""Temporary folders that do not outlive their process for long, however it ends.

A folder is locked by the process that made it, and the kernel frees the lock when that process dies. Whoever makes the
next folder removes those that nobody holds any more.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NEW = 60.0  # seconds; an empty folder this young may be about to be locked


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Give an empty folder where the system has its temporary files (`TMPDIR`); it is removed at the end of the block.

    What dead processes of this user left of the same purpose is removed first.

    Args:
        purpose: a word for the folder's name.
    """
    for path in Path(tempfile.gettempdir()).glob(f"lewis-{purpose}-*"):
        with suppress(OSError):  # another process was faster
            if _is_abandoned(path):
                shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=f"lewis-{purpose}-") as name:
        held = _locked(Path(name))
        try:
            yield Path(name)
        finally:
            os.close(held)


def _locked(folder: Path) -> int:
    """A descriptor that holds the lock of a folder.

    Raises:
        BlockingIOError: another process holds it.
    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _is_abandoned(folder: Path) -> bool:
    found = folder.lstat()
    if found.st_uid != os.getuid():
        return False
    os.close(_locked(folder))
    return found.st_mtime < time.time() - _NEW or any(folder.iterdir())
