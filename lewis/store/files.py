"""Files of the store, the folder LEWIS_HOME, which holds everything that LEWIS writes, addressed by content.

    importance/<digest>.json  merged/<digest>/  scores/<digest>.json  ...

An entry is written next to its final path and renamed, so a reader never sees half of one. A merged folder has a
manifest (`lewis.json`) with the size and checksum of each file, against which the folder is checked before it is used
(`lewis.store.manifest`). Entries of one file carry a checksum of their own (`lewis.store.entries`).
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lewis.errors import InputError, LewisError
from lewis.input_files import open_regular
from lewis.settings import QUOTA, size_text
from lewis.store import size
from lewis.store.folders import holds, home, make_folder, make_shared_file, restrict, umask
from lewis.store.scratch import beside, is_dead, place_of, writer_of

MANIFEST = "lewis.json"
CARD = ("README.md", "density.png", ".eval_results/lewis.yaml")
"""Names of a model card, its picture and its scores; manifests do not list them, since they may change."""
RESUMABLE = ".resumable.partial"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk."""
_NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.EACCES)  # of file systems that cannot wait for a folder, such as CIFS
_KEPT = 86400.0  # seconds for which a half-written folder is kept, so that it can be continued


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(name: str) -> FileLock:
    """A lock between processes and threads, held as `with lock("..."):`. The kernel frees it when its holder dies."""
    path = make_folder(home() / "locks") / (hashlib.sha256(name.encode()).hexdigest()[:32] + ".lock")
    make_shared_file(path)
    return FileLock(path, thread_local=False, mode=0o660 & ~umask())


@contextmanager
def written_beside(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Give a scratch path to write to. It replaces `path` if the block ends without an exception, else it is removed.

    Scratch files that dead processes left for `path` are removed too.

    Args:
        path: where the file goes.
        private: whether only its owner may read it, such as a key, even if a group shares the store.

    Raises:
        OSError: if it cannot be written; on a full disk with its `filename`.
    """
    make_folder(path.parent)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if is_abandoned(leftover):
            leftover.unlink(missing_ok=True)
    scratch = beside(path)
    try:
        if private:
            scratch.touch(mode=0o600)
        yield scratch
        if holds(path) and not private:
            restrict(scratch)
        os.replace(scratch, path)
    except OSError as error:
        if error.errno in FULL:
            error.filename = error.filename or str(path)  # a write to a full disk gives none
        raise
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    with written_beside(path) as scratch, scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str, *, modified: float | None = None) -> None:
    """Write a text to a file as UTF-8, by `write_bytes`.

    Args:
        path: where the file goes.
        text: its content.
        modified: the file's modification time (Unix time, seconds); None: now.
    """
    write_bytes(path, text.encode())
    if modified is not None:
        os.utime(path, (modified, modified))


def write_json(path: Path, value: Any) -> None:
    """Write a value to a file as indented JSON, by `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any | None:
    """Return the value in a JSON file; None if it is absent or not JSON. `lewis.store.entries` reads entries."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError):
        return None


def free_space(folder: Path) -> int:
    """Bytes free on the file system of `folder`, which need not exist yet; in the store at most what its quota leaves.

    Raises:
        InputError: if `LEWIS_QUOTA` is no size.
    """
    return _free(folder)[0]


def check_space(folder: Path, needed: int, what: str = "the output") -> None:
    """Raise InputError unless the file system of `folder`, and the quota, have room for `needed` bytes, for `what`.

    The error's cause is the OSError of a full disk, by which callers that can write elsewhere recognise it.
    """
    free, by_quota = _free(folder)
    if free < needed:
        fix = "raise LEWIS_QUOTA, remove what you can do without (`lewis gc --days 1`)" if by_quota else "free some"
        where = f"LEWIS_QUOTA leaves {size_text(free)}" if by_quota else f"{size_text(free)} are free"
        raise InputError(
            f"{folder}: no space: {what} needs {size_text(needed)}, {where}; "
            f"{fix}, or write elsewhere (-o, or LEWIS_HOME)"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free(folder: Path) -> tuple[int, bool]:
    """Return the bytes that may be written to `folder`, and whether the quota limits them, not the disk."""
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    quota = QUOTA.get() if holds(folder) else None
    left = free if quota is None else max(quota - size.total(), 0)
    return min(free, left), left < free


def bytes_on_disk(folder: Path) -> int:
    """Bytes on disk of the files in a folder; parts of sparse files that were never written do not count."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def sweep(folder: Path, target: str | None = None) -> None:
    """Remove what dead processes (kill -9, power failure) left half-written in `folder`.

    A folder that a dead process was about to replace is put back if nothing took its place. A half-written folder that
    the same command could continue is kept for a day, unless it was to become `target`: the caller is about to write
    something else there.
    """
    for leftover in folder.glob(".*.partial"):
        if (place := _missing(leftover)) and _writer_is_dead(leftover):
            with suppress(OSError):  # another process was faster, or the folder is read-only
                os.rename(leftover, place)
        elif is_abandoned(leftover) and not (_can_resume(leftover) and _target(leftover) != target):
            discard(leftover)


def is_abandoned(leftover: Path) -> bool:
    """Whether `leftover` is a scratch path of LEWIS whose process is dead (`scratch.is_dead`), and of no more use.

    Hidden files of other programs may end in `.partial` too, such as downloads in the folder of an output.
    """
    if leftover.name.endswith(RESUMABLE):
        try:
            with lock(str(leftover.absolute())).acquire(timeout=0):
                return True
        except Timeout:
            return False
    return _writer_is_dead(leftover) and not _missing(leftover)


def _writer_is_dead(leftover: Path) -> bool:
    writer = writer_of(leftover)
    return writer is not None and is_dead(writer, leftover)


def _missing(leftover: Path) -> Path | None:
    """Return the place of an earlier output that was set aside whole, if nothing is there; else None."""
    place = place_of(leftover)
    return place if place and not os.path.lexists(place) and (leftover / MANIFEST).is_file() else None


def _can_resume(leftover: Path) -> bool:
    if not leftover.name.endswith(RESUMABLE):
        return False
    with suppress(OSError):
        return max(path.stat().st_mtime for path in (leftover, *leftover.iterdir())) > time.time() - _KEPT
    return False


def _target(leftover: Path) -> str:
    """Return the name of the folder that a resumable scratch folder was to become."""
    return leftover.name.removesuffix(RESUMABLE).rpartition(".")[0].removeprefix(".")


def wait_for_disk(*paths: Path) -> None:
    """Return once files, and the names in folders, are on the disk, where they survive a power failure.

    Raises:
        OSError: if the disk fails.
    """
    for path in paths:
        try:
            held = os.open(path, os.O_RDONLY)
            try:
                os.fsync(held)
            finally:
                os.close(held)
        except OSError as error:
            if not (path.is_dir() and error.errno in _NO_FOLDERS):
                raise


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def discard_unless(check: Callable[[], None], scratch: Path) -> None:
    """Run a check; if it fails, remove the files written so far, so that no later process continues with them.

    Raises:
        LewisError: the error of the check.
    """
    try:
        check()
    except LewisError:
        discard(scratch)
        raise
