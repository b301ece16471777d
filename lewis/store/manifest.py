"""Check that the files of published folders are byte for byte as written, by the checksums in their manifests.

Computed checksums and other facts are remembered in the store, since to hash gigabytes at every start takes minutes.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis.store import files, kinds, remote, sealed_json
from lewis.store.entries import mark_used, read_entry, set_aside, write_entry
from lewis.store.files import MANIFEST
from lewis.store.sealed_json import DamagedError
from lewis.threads import ContextPool

_SMALL = 1 << 20  # to read a file below this size takes less time than to remember its checksum
_LARGE = 1 << 28  # files above this size take longer to hash than a clock tick
_TIMESTAMP_TICK = 100_000_000  # ns; a file that changes twice within a tick of the file system's clock keeps its stamp


def read_manifest(folder: Path, *, content: bool = True) -> dict[str, Any] | None:
    """Return the manifest of a published folder and mark the folder as used; None if `check` finds it damaged.

    Args:
        folder: as `publish` wrote it.
        content: False for callers that check the content of each file themselves: then only sizes are compared.
    """
    try:
        return check(folder, content=content)
    except DamagedError:
        return None


def check(folder: Path, *, again: bool = False, content: bool = True) -> dict[str, Any]:
    """Check the content of every file of a published folder against its manifest, and mark the folder as used.

    A folder that only the remote half of the store has is fetched. A checksum is remembered for as long as the
    file's inode, size and times stay the same.

    Args:
        folder: as `publish` wrote it. Files that the manifest does not name are not checked.
        again: whether to read every file, without the remembered checksums.
        content: whether to compare checksums, and not sizes only.

    Returns:
        The manifest.

    Raises:
        DamagedError: if a file is missing, or has another size or another SHA-256.
    """
    mark_used(folder / MANIFEST)
    remote.fetch(folder)
    try:
        manifest = sealed_json.read(folder / MANIFEST)
        expected = kinds.listed(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST}: {getattr(error, 'strerror', None) or error}") from error
    sizes = {name: (size, None) for name, (size, _) in expected.items()}
    check_files(folder, expected if content else sizes, again=again)
    return manifest


def set_damaged_aside(folder: Path) -> None:
    """Move a published folder to the quarantine if it is damaged. Call it under the entry's lock."""
    try:
        check(folder)
    except DamagedError as error:
        if folder.exists():
            set_aside([folder], str(error))


def check_files(folder: Path, expected: Mapping[str, tuple[int, str | None]], *, again: bool = False) -> None:
    """Check that files have the expected sizes and checksums.

    Args:
        folder: the folder of the files.
        expected: name -> size in bytes and SHA-256; None: only the size is known.
        again: whether to read every file, without the remembered checksums.

    Raises:
        DamagedError: naming the first file that is missing or has another size or content.
    """

    def problem(item: tuple[str, tuple[int, str | None]]) -> str | None:
        name, (size, sha256) = item
        try:
            if (found := (folder / name).stat().st_size) != size:
                return f"{name}: expected {size} bytes, it has {found}"
            if sha256 and (is_now := remembered_sha256(folder / name, again=again)) != sha256:
                return f"{name}: expected SHA-256 {sha256}, it is {is_now}"
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None

    with ContextPool(4) as pool:
        for found in pool.map(problem, expected.items()):
            if found:
                raise DamagedError(found)


def place_of(facts: Any) -> Path:
    """Return the path at which the store remembers a result that was computed from `facts`, plain JSON data."""
    return kinds.DIGESTS.path(files.digest(facts)[:40])


def remembered_sha256(path: Path, *, again: bool = False) -> str:
    """SHA-256 (64 hex digits) of a file.

    A file of 1 MiB or more is read again only if its path, size, times or inode changed, a smaller one at each call.

    Args:
        path: path of the file.
        again: whether to read the file in any case, and replace the remembered checksum.
    """
    path = path.resolve()
    stamp, start = _stamp(path), time.time_ns()
    if stamp[0] < _SMALL:
        return files.file_sha256(path)
    entry = place_of(str(path))
    known = None if again else read_entry(entry)
    if known and known.get("stamp") == stamp:
        return str(known["sha256"])
    sha256 = files.file_sha256(path)
    changed_at = stamp[2]
    with suppress(OSError):  # the store is full or read-only: the checksum is computed again next time
        if _stamp(path) == stamp and start - changed_at > _TIMESTAMP_TICK:
            write_entry(entry, {"stamp": stamp, "sha256": sha256})
        elif again:
            entry.unlink(missing_ok=True)
    return sha256


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def remember(written: Mapping[Path, str]) -> None:
    """Remember the checksums of files that were just written and hashed, as if `remembered_sha256` had read them.

    A checksum can be remembered once its file has not changed for a tick of the file system's clock. The function waits
    for that only if the files are so large that to read them again would take longer.

    Args:
        written: file -> SHA-256 of its bytes. No other process may write to the file meanwhile.
    """
    with suppress(OSError):  # the store is full or read-only: the checksum is computed again next time
        stamps = {path: stamp for path in written if (stamp := _stamp(path))[0] >= _SMALL}
        if sum(stamp[0] for stamp in stamps.values()) < _LARGE:
            return
        unchanged = time.time_ns() - max(stamp[2] for stamp in stamps.values())
        if 0 <= unchanged <= _TIMESTAMP_TICK:
            time.sleep((_TIMESTAMP_TICK - unchanged) / 1e9)
        for path, stamp in stamps.items():
            if stamp == _stamp(path):
                write_entry(place_of(str(path.resolve())), {"stamp": stamp, "sha256": written[path]})
