"""What was found out once and is remembered, such as checksums: hashing gigabytes at every start would cost minutes."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis import store

_TIMESTAMP_TICK = 100_000_000  # ns; a file changed twice within a tick of the file system's clock keeps its stamp


def place_of(facts: Any) -> Path:
    """Where the store remembers what was found out about `facts`, which are plain data."""
    return store.home() / "digests" / f"{store.digest(facts)[:40]}.json"


def remembered_sha256(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file, read again only when its place, size, times or inode changed."""
    path = path.resolve()
    entry = place_of(str(path))
    known, stamp, start = store.read_entry(entry), _stamp(path), time.time_ns()
    if isinstance(known, dict) and known.get("stamp") == stamp:
        return str(known["sha256"])
    sha256 = store.file_sha256(path)
    changed_at = stamp[2]
    if _stamp(path) == stamp and start - changed_at > _TIMESTAMP_TICK:
        with suppress(OSError):  # a store that is full or may only be read: it is found out again
            store.write_json(entry, {"stamp": stamp, "sha256": sha256})
    return sha256


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
