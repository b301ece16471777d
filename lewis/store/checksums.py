"""Facts that are computed once and remembered, such as checksums: to hash gigabytes at every start takes minutes."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis import store
from lewis.store import kinds

_TIMESTAMP_TICK = 100_000_000  # ns; a file that changes twice within a tick of the file system's clock keeps its stamp
_LARGE = 1 << 28  # bytes that take longer to hash than a tick


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


def remember(written: Mapping[Path, str]) -> None:
    """Remember the checksums of files that were just written and hashed, as if `remembered_sha256` had read them.

    A file can be remembered once it has not changed for a tick of the file system's clock. This waits for that only
    where it takes less time than to read the files again.

    Args:
        written: file -> SHA-256 of its bytes. No other process may write to it meanwhile.
    """
    with suppress(OSError):  # the store is full or read-only: the checksum is computed again next time
        stamps = {path.resolve(): _stamp(path) for path in written}
        if sum(stamp[0] for stamp in stamps.values()) < _LARGE:
            return
        unchanged = time.time_ns() - max(stamp[2] for stamp in stamps.values())
        if 0 <= unchanged <= _TIMESTAMP_TICK:
            time.sleep((_TIMESTAMP_TICK - unchanged) / 1e9)
        for path, sha256 in written.items():
            if stamps[path.resolve()] == _stamp(path):
                store.write_entry(place_of(str(path.resolve())), {"stamp": _stamp(path), "sha256": sha256})


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
