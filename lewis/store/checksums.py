"""Facts that are computed once and remembered, such as checksums: to hash gigabytes at every start takes minutes."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis import store
from lewis.store import kinds

_TIMESTAMP_TICK = 100_000_000  # ns; a file that changes twice within a tick of the file system's clock keeps its stamp


def place_of(facts: Any) -> Path:
    """Where the store remembers what was computed from `facts`, which are plain data."""
    return kinds.DIGESTS.path(store.digest(facts)[:40])


def remembered_sha256(path: Path, *, anew: bool = False) -> str:
    """SHA-256 (64 hex digits) of a file, read again only when its place, size, times or inode changed.

    Args:
        path: of the file.
        anew: read it in any case; what was remembered is replaced.
    """
    path = path.resolve()
    entry, stamp, start = place_of(str(path)), _stamp(path), time.time_ns()
    known = None if anew else store.read_entry(entry)
    if known and known.get("stamp") == stamp:
        return str(known["sha256"])
    sha256 = store.file_sha256(path)
    changed_at = stamp[2]
    with suppress(OSError):  # the store is full or read-only: the checksum is computed again next time
        if _stamp(path) == stamp and start - changed_at > _TIMESTAMP_TICK:
            store.write_entry(entry, {"stamp": stamp, "sha256": sha256})
        elif anew:
            entry.unlink(missing_ok=True)
    return sha256


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
