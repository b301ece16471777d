"""Who writes to the store, and whether a writer is dead.

A store may be shared by machines, by containers and over restarts, so a process number alone says nothing. A writer is
known by host name, boot id, PID namespace and process number. Only a process of the same host, boot and namespace can
be asked for whether it lives. What another one left is judged by its age.
"""

import hashlib
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

AGE = 86400.0  # seconds; what a writer that cannot be asked has not touched for so long is abandoned


def writer() -> str:
    """This process, as part of a file's name: 12 hex digits for host, boot and namespace, a dash, and its number."""
    return f"{_place() or 'unknown'}-{os.getpid()}"


def beside(path: Path) -> Path:
    """A scratch path in the same folder. Readers ignore it, and `sweep` removes it once this process is dead."""
    return path.with_name(f".{path.name}.{writer()}.{uuid.uuid4().hex[:8]}.partial")


def is_dead(name: str, left: Path) -> bool:
    """Whether a writer is dead.

    Args:
        name: what `writer` gave in its process; other words are those of a writer that cannot be asked.
        left: the file or folder that it writes. If the writer cannot be asked, it counts as dead when nothing in there
            has changed for `AGE`.
    """
    place, _, number = name.rpartition("-")
    if place and place == _place() and number.isdecimal():
        return not _is_alive(int(number))
    with suppress(OSError):  # it is gone by now, or moves
        return max(path.lstat().st_mtime for path in (left, *left.rglob("*"))) < time.time() - AGE
    return False


def _place() -> str | None:
    """Host, boot and PID namespace of this process; None where the system does not tell the last two."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        told = [os.uname().nodename, boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return None
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, as another user
    return True
