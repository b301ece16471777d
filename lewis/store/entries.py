"""Read and write entries of the store: whole or not at all, with checksums; damaged ones are moved to quarantine.

An entry is one JSON file (`write_entry`) or a folder with a manifest (`publish`; `lewis.store.manifest` checks it).
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lewis.errors import InputError
from lewis.store import files, kinds, remote, sealed_json
from lewis.store.files import CARD, MANIFEST
from lewis.store.folders import holds, make_folder, make_read_only, restrict, restrict_all
from lewis.store.scratch import beside

logger = logging.getLogger(__name__)

COPIED = "backup"  # key of a manifest: the store that the folder is a copy of
MARK_EVERY = 3600.0  # seconds by which the mark of `mark_used` may be older than the last use
_making: ContextVar[list[Path] | None] = ContextVar("making", default=None)


@contextmanager
def noticing() -> Iterator[list[Path]]:
    """Collect in a list the entries that this thread writes during the block, without those it finds in the store."""
    made = list[Path]()
    token = _making.set(made)
    try:
        yield made
    finally:
        _making.reset(token)


@contextmanager
def publish(
    folder: Path, manifest: dict[str, Any], key: str | None = None, checksums: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Give a scratch folder to write into; if the block raises nothing, add the manifest and rename it to `folder`.

    In the store the files are then read-only: MLflow's copy of the weights may be a hard link to the same file, so that
    one accidental write would damage both. The manifest lists no symbolic links, since these may lead anywhere.

    Args:
        folder: where the finished folder goes. An older folder that has a manifest is replaced.
        manifest: what to record in `lewis.json`, in addition to the files' sizes and checksums.
        key: identity of the content, if the block can continue a half-written folder: the scratch folder then holds
            what a process that died had written to it under the same key. None: the scratch folder is empty.
        checksums: file name -> SHA-256, for the files whose checksum the block knows; the others are read.

    Raises:
        InputError: if `folder` holds something that was not written by this function.
    """
    check_replaceable(folder, manifest)
    make_folder(folder.parent)
    scratch = folder.with_name(f".{folder.name}.{key[:32]}{files.RESUMABLE}") if key else beside(folder)
    with files.lock(str(scratch.absolute())) if key else nullcontext():
        files.sweep(folder.parent, folder.name)
        _make_scratch(scratch)
        try:
            yield scratch
            # Left by a process that died when it was almost done.
            for path in (scratch / MANIFEST, *scratch.glob(".*.partial")):
                path.unlink(missing_ok=True)
            paths = sorted(p for p in scratch.rglob("*") if p.is_file() and not p.is_symlink())
            names = [str(path.relative_to(scratch)) for path in paths]
            described = {n: _described(p, (checksums or {}).get(n)) for n, p in zip(names, paths, strict=True)}
            files.write_text(scratch / MANIFEST, sealed_json.dumps({**manifest, "files": described}))
            if holds(folder):
                restrict_all(scratch)
                for path in paths:
                    make_read_only(path)
            check_replaceable(folder, manifest)  # the block may have taken hours
            _put(scratch, folder)
            if holds(folder):
                _push(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _put(scratch: Path, folder: Path) -> None:
    """Replace a folder as a whole: a part of the earlier one, left after a kill, would be taken for someone else's.

    The earlier one goes only once the new one is on the disk. After a kill before that, `sweep` puts it back.
    """
    if folder.exists():
        files.wait_for_disk(*(path for path in (scratch, *scratch.rglob("*")) if not path.is_symlink()))
    earlier = beside(folder, earlier=True)
    with suppress(FileNotFoundError):
        os.rename(folder, earlier)
    try:
        os.replace(scratch, folder)
    except OSError:
        with suppress(FileNotFoundError):
            os.rename(earlier, folder)
        raise
    if earlier.exists():
        files.wait_for_disk(folder.parent)
        with suppress(OSError):
            (earlier / MANIFEST).unlink()  # first, so that no part of it is put back
        shutil.rmtree(earlier, ignore_errors=True)


def _make_scratch(scratch: Path) -> None:
    """Make a scratch folder. From an existing one, files of other users of the store are removed, since this user may
    neither read all of them nor change their modes.
    """
    make_folder(scratch)
    if holds(scratch) and scratch.stat().st_uid == os.getuid():
        restrict(scratch)
    for path in scratch.iterdir():
        if not os.access(path, os.W_OK) or (holds(scratch) and path.lstat().st_uid != os.getuid()):
            files.discard(path)


def _described(path: Path, sha256: str | None) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256 or files.file_sha256(path)}


def check_replaceable(folder: Path, manifest: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raise InputError unless `folder` is empty, an earlier output of `publish`, or absent where one can be made.

    Outside of the store, where people put files of their own, the folder may hold nothing but that output. The copy of
    a store that `lewis backup` made is replaced only by a copy of the same store.

    Args:
        folder: the folder that is to be written.
        manifest: the manifest of the new content.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder to write to, got a file; choose another path")
    if folder.is_mount():
        raise InputError(f"{folder}: a disk is mounted there, so it cannot be replaced as a whole; name a folder in it")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: not empty, and no earlier output of LEWIS ({MANIFEST} is missing); choose another")
    if folder.is_dir() and not holds(folder) and (other := _unlisted(folder)):
        raise InputError(f"{folder}: holds {other!r}, which LEWIS did not write; move it away, or choose another path")
    found = files.read_json(folder / MANIFEST)
    copied = found.get(COPIED) if isinstance(found, dict) else None
    if copied and copied != manifest.get(COPIED):
        raise InputError(
            f"{folder}: holds the copy of the store {copied} that `lewis backup` made; choose another path"
        )
    above = next((parent for parent in folder.absolute().parents if parent.exists()), folder)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder}: {above} is no folder, or may not be written to; choose another path")


def _unlisted(folder: Path) -> str | None:
    """Return a file of a folder that neither its manifest lists nor a model card has; None if there is no such file."""
    manifest = files.read_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    known = {MANIFEST, *CARD, *(listed if isinstance(listed, dict) else ())}
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return next((name for name in found if name not in known), None)


def write_entry(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write an entry of one file: a non-empty JSON object with its checksum; push it if its kind is shared."""
    files.write_text(path, sealed_json.dumps(content, indent))
    _push(path)


def _push(path: Path) -> None:
    if (made := _making.get()) is not None:
        made.append(path)
    remote.push(path)


def read_entry(path: Path) -> dict[str, Any] | None:
    """Read what `write_entry` wrote and mark it as used; fetch it if only the remote half has it.

    Returns:
        The object; None if the entry is absent or damaged. A damaged entry is set aside, and the caller makes it again.
    """
    mark_used(path)
    remote.fetch(path)
    try:
        return sealed_json.read(path)
    except sealed_json.DamagedError as error:
        set_aside([path], str(error))
    except OSError:
        pass
    return None


def entry(path: Path, key: str) -> Any | None:
    """Return the value under `key` in an entry; None if it is empty, or the entry is absent or damaged."""
    return (read_entry(path) or {}).get(key) or None


def mark_used(path: Path) -> None:
    """Note by an entry's modification time, for housekeeping, that it is in use; at most once every `MARK_EVERY`.

    Call it before reading the entry, so that housekeeping sees the use before it removes the entry.
    """
    with suppress(OSError):  # the entry is absent, or the store is read-only
        if path.stat().st_mtime < time.time() - MARK_EVERY:
            os.utime(path)


def set_aside(paths: Sequence[Path], why: str) -> None:
    """Move a damaged entry into the store's quarantine, where no reader finds it, and log a warning.

    Nothing is deleted: `lewis gc` deletes it when it is old. A folder outside of the store is not moved.

    Args:
        paths: the file or folder of the entry, and its second file if it has one.
        why: the file that is damaged, and what is wrong with it.
    """
    if not holds(paths[0]):
        logger.warning("%s is damaged and not used: %s", paths[0], why)
        return
    moved = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 10**9:09d}"
    where = "it cannot be moved away"
    for path in paths:
        with suppress(OSError):  # another process was faster, or the store is read-only
            folder = make_folder(kinds.QUARANTINE.folder)
            target = folder / f"{path.parent.name}-{path.stem[:16]}-{moved}{path.suffix}"
            os.rename(path, target)
            os.utime(target)  # housekeeping counts its age from now on
            where = f"set aside as {target}"
    logger.warning("%s is damaged and made again: %s; %s", paths[0], why, where)
