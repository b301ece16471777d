"""The store: everything written to disk, under LEWIS_HOME, addressed by content.

    importance/<digest>.json  merged/<digest>/  scores/<digest>.json  ...

An entry is written beside its final path and renamed, so a reader never sees half of one. A merged folder has a
manifest (`lewis.json`) with the size and checksum of each file, against which the folder is checked before it is used
(`lewis.store.manifest`). Entries of one file carry a checksum of their own (`lewis.store.entries`).
"""

import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lewis.errors import InputError
from lewis.input_files import open_regular
from lewis.store import checked, made, remote, size
from lewis.store.folders import holds, home, make_folder, make_read_only, restrict, umask
from lewis.store.lease import SharedLock
from lewis.store.writers import beside, is_dead

MANIFEST = remote.MANIFEST
_RESUMABLE = ".resumable.partial"
_KEPT = 86400.0  # seconds; for so long a half-written folder is kept, to be continued


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
    return FileLock(path, thread_local=False, mode=0o660 & ~umask())


def shared_lock(name: str, local: str = "") -> SharedLock:
    """A lock between processes and threads of this machine, and with `LEWIS_STORE` between machines.

    Args:
        name: the same on every machine.
        local: name of the lock of this machine, if that is another; paths may differ between machines.
    """
    return SharedLock(lock(local or name), name)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a scratch path to write to. It replaces `path` if the block ends without an exception, else it is removed.

    Scratch files that dead processes left for `path` are removed too.
    """
    make_folder(path.parent)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if is_abandoned(leftover):
            leftover.unlink(missing_ok=True)
    scratch = beside(path)
    try:
        yield scratch
        if holds(path):
            restrict(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    with written_beside(path) as scratch, scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def publish(
    folder: Path, manifest: dict[str, Any], key: str | None = None, checksums: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Give a scratch folder to write into; if the block raises nothing, add the manifest and rename it to `folder`.

    In the store the files are read-only then: MLflow's copy of the weights may be a hard link of the same file, and one
    slip must not damage both.

    Args:
        folder: where the finished folder goes. An older folder that has a manifest is replaced.
        manifest: what to record in `lewis.json`, beside the files' sizes and checksums.
        key: identity of what is written, if the block can continue a half-written folder. The scratch folder then
            holds what a process left that was writing the same to `folder` and died. Without a key, it is empty.
        checksums: file name -> SHA-256, for the files whose checksum the block knows; the others are read.

    Raises:
        InputError: if `folder` holds something that was not written by this function.
    """
    check_replaceable(folder)
    make_folder(folder.parent)
    scratch = folder.with_name(f".{folder.name}.{key[:32]}{_RESUMABLE}") if key else beside(folder)
    with lock(str(scratch.absolute())) if key else nullcontext():
        sweep(folder.parent, folder.name)
        scratch.mkdir(exist_ok=bool(key))
        try:
            yield scratch
            # What a process left that died when it was almost done.
            for path in (scratch / MANIFEST, *scratch.glob(".*.partial")):
                path.unlink(missing_ok=True)
            paths = sorted(p for p in scratch.rglob("*") if p.is_file())
            names = [str(path.relative_to(scratch)) for path in paths]
            files = {n: _described(p, (checksums or {}).get(n)) for n, p in zip(names, paths, strict=True)}
            write_text(scratch / MANIFEST, checked.dumps({**manifest, "files": files}))
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(scratch, folder)
            if holds(folder):
                restrict(folder)
                for name in names:
                    make_read_only(folder / name)
                made.note(folder)
                remote.push(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _described(path: Path, sha256: str | None) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256 or file_sha256(path)}


def check_replaceable(folder: Path) -> None:
    """Raise InputError unless `folder` is empty, an earlier output of `publish`, or absent where one can be made."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder to write to, got a file; choose another path")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: not empty, and no earlier output of LEWIS ({MANIFEST} is missing); choose another")
    above = next((parent for parent in folder.absolute().parents if parent.exists()), folder)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder}: {above} is no folder, or may not be written to; choose another path")


def read_json(path: Path) -> Any | None:
    """The content of a JSON file, or None if it is absent or no JSON. Entries are read by `lewis.store.entries`."""
    try:
        return json.loads(path.read_text())
    except (OSError, RecursionError, ValueError):
        return None


def free_space(folder: Path) -> int:
    """Bytes free on the file system of `folder`, which need not exist yet; in the store at most what its quota leaves.

    Raises:
        InputError: if `LEWIS_QUOTA` is no size.
    """
    return _free(folder)[0]


def check_space(folder: Path, needed: int, what: str = "the output") -> None:
    """Raise InputError unless the file system of `folder`, and the quota, have room for `needed` bytes, for `what`."""
    free, by_quota = _free(folder)
    if free < needed:
        fix = "raise LEWIS_QUOTA, remove what you can do without (`lewis gc --days 1`)" if by_quota else "free some"
        where = f"LEWIS_QUOTA leaves {free / 1e9:.2f} GB" if by_quota else f"{free / 1e9:.2f} GB are free"
        raise InputError(
            f"{folder}: no space: {what} needs {needed / 1e9:.2f} GB, {where}; "
            f"{fix}, or write elsewhere (-o, or LEWIS_HOME)"
        )


def _free(folder: Path) -> tuple[int, bool]:
    """Bytes that may be written to `folder`, and whether it is the quota that allows no more."""
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    quota = size.quota() if holds(folder) else None
    left = free if quota is None else max(quota - size.total(), 0)
    return min(free, left), left < free


def bytes_on_disk(folder: Path) -> int:
    """Bytes that the files of a folder occupy; allocated parts that were never written do not count."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def sweep(folder: Path, target: str | None = None) -> None:
    """Remove what dead processes (kill -9, power failure) left half-written in `folder`.

    A folder that the same command could continue is kept for a day, unless `target` is its name: then something else
    is about to be written there.
    """
    for leftover in folder.glob(".*.partial"):
        if is_abandoned(leftover) and not (_can_resume(leftover) and _target(leftover) != target):
            discard(leftover)


def is_abandoned(leftover: Path) -> bool:
    """Whether the process that wrote to `leftover`, a scratch path of this module, is dead (`writers.is_dead`)."""
    if leftover.name.endswith(_RESUMABLE):
        try:
            with lock(str(leftover.absolute())).acquire(timeout=0):
                return True
        except Timeout:
            return False
    return is_dead(leftover.name.split(".")[-3], leftover)


def _can_resume(leftover: Path) -> bool:
    if not leftover.name.endswith(_RESUMABLE):
        return False
    with suppress(OSError):
        return max(path.stat().st_mtime for path in (leftover, *leftover.iterdir())) > time.time() - _KEPT
    return False


def _target(leftover: Path) -> str:
    """The name of the folder that was to be written."""
    return leftover.name.removesuffix(_RESUMABLE).rpartition(".")[0].removeprefix(".")


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
