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

_MADE, _NEW = "new-", 60.0  # what the name of a folder has until it is locked; seconds that this takes at most


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Give an empty folder where the system has its temporary files (`TMPDIR`); it is removed at the end of the block.

    What dead processes of this user left of the same purpose is removed first.

    Args:
        purpose: a word for the folder's name.
    """
    parent, prefix = Path(tempfile.gettempdir()), f"lewis-{purpose}-"
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # another process was faster
            if _is_abandoned(path, prefix):
                shutil.rmtree(path)
    made = Path(tempfile.mkdtemp(prefix=f"{prefix}{_MADE}"))
    held = _locked(made)
    try:
        ours = made.rename(parent / made.name.replace(f"{prefix}{_MADE}", prefix, 1))
        try:
            with tempfile.TemporaryDirectory(dir=ours) as name:  # which removes also what is read-only in it
                yield Path(name)
        finally:
            shutil.rmtree(ours, ignore_errors=True)
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


def _is_abandoned(folder: Path, prefix: str) -> bool:
    found = folder.lstat()
    is_new = folder.name.startswith(f"{prefix}{_MADE}") and found.st_mtime > time.time() - _NEW
    if found.st_uid != os.getuid() or is_new:
        return False
    os.close(_locked(folder))
    return True
