"""The store: everything written to disk, under LEWIS_HOME, addressed by content.

    importance/<digest>.json  merged/<digest>/  scores/<digest>.json  ...

An entry is written beside its place and renamed in, so a reader never sees half of one. A merged folder carries a
manifest (`lewis.json`) with the size and checksum of each file; what a cache says exists is checked against it.
"""

import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lewis.errors import InputError

MANIFEST = "lewis.json"
_RESUMABLE = ".resumable.partial"
_KEPT = 86400.0  # seconds that a resumable part is kept for
MARK_EVERY = 3600.0  # seconds; `mark_used` lags behind the last use by no more


def home() -> Path:
    """The root of the store: the absolute path of `LEWIS_HOME`, by default `~/.cache/lewis`."""
    return Path(os.environ.get("LEWIS_HOME") or "~/.cache/lewis").expanduser().resolve()


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(name: str) -> FileLock:
    """A lock between processes and threads, held as `with lock("..."):`. The kernel frees it when its holder dies."""
    path = home() / "locks" / (hashlib.sha256(name.encode()).hexdigest()[:32] + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a path to write a file at; it takes the place of `path` when the block ends well, else it is removed.

    What processes that died were writing to `path` is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if is_abandoned(leftover):
            leftover.unlink(missing_ok=True)
    scratch = beside(path)
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part."""
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
    """Give a scratch folder to write into; when the block ends well, add the manifest and rename it to `folder`.

    Args:
        folder: where the finished folder goes. An older folder that has a manifest is replaced.
        manifest: what to record in `lewis.json`, beside the files' sizes and checksums.
        key: identity of what is written, if the block can go on from a part of it: then the scratch folder may hold
            what a process left that was writing the same to `folder` and died. Without a key, it is empty.
        checksums: SHA-256 of files by their names, as far as the block knows them; the others are read.

    Raises:
        InputError: if `folder` holds something that was not written by this function.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{key[:32]}{_RESUMABLE}") if key else beside(folder)
    with lock(str(scratch.absolute())) if key else nullcontext():
        sweep(folder.parent, folder.name)
        scratch.mkdir(exist_ok=bool(key))
        try:
            yield scratch
            for path in (scratch / MANIFEST, *scratch.glob(".*.partial")):  # of one that died when it was almost done
                path.unlink(missing_ok=True)
            paths = sorted(p for p in scratch.rglob("*") if p.is_file())
            names = [str(path.relative_to(scratch)) for path in paths]
            files = {n: _described(p, (checksums or {}).get(n)) for n, p in zip(names, paths, strict=True)}
            write_json(scratch / MANIFEST, {**manifest, "files": files})
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(scratch, folder)
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


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published folder whose files are all there with their sizes, now marked as used; else None."""
    mark_used(folder / MANIFEST)
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        whole = all((folder / name).stat().st_size == file["size"] for name, file in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


def read_json(path: Path) -> Any | None:
    """The content of a JSON entry, or None if it is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_entry(path: Path) -> Any | None:
    """`read_json` of an entry of the store, which is marked as used."""
    mark_used(path)
    return read_json(path)


def entry(path: Path, key: str) -> Any | None:
    """What a JSON entry holds under `key`, marked as used; None if the entry is absent, damaged or empty."""
    content = read_entry(path)
    return (content.get(key) or None) if isinstance(content, dict) else None


def mark_used(path: Path) -> None:
    """Note for housekeeping that an entry is in use: in its modification time, which is renewed every `MARK_EVERY`.

    To be called before the entry is read, so that one which is being removed is seen to be in use.
    """
    with suppress(OSError):  # absent, or of a store that may only be read
        if path.stat().st_mtime < time.time() - MARK_EVERY:
            os.utime(path)


def free_space(folder: Path) -> int:
    """Bytes free on the file system of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError unless the file system of `folder` has `needed` bytes free."""
    free = free_space(folder)
    if free < needed:
        raise InputError(
            f"{folder}: no space: the output needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some, or write elsewhere (-o, or LEWIS_HOME)"
        )


def bytes_on_disk(folder: Path) -> int:
    """What the files of a folder occupy; a part that was laid out and not written does not count."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def sweep(folder: Path, target: str | None = None) -> None:
    """Remove what processes that died (kill -9, power) left half-written in `folder`.

    What the same command could go on from is kept for a day, unless something else is to be written to `target`.
    """
    for leftover in folder.glob(".*.partial"):
        if is_abandoned(leftover) and not (_can_resume(leftover) and _target(leftover) != target):
            discard(leftover)


def is_abandoned(leftover: Path) -> bool:
    """Whether the process that was writing at `leftover`, a scratch path of this module, is dead."""
    if leftover.name.endswith(_RESUMABLE):
        try:
            with lock(str(leftover.absolute())).acquire(timeout=0):
                return True
        except Timeout:
            return False
    writer = leftover.name.split(".")[-3]
    return writer.isdecimal() and not is_alive(int(writer))


def _can_resume(leftover: Path) -> bool:
    if not leftover.name.endswith(_RESUMABLE):
        return False
    with suppress(OSError):
        return max(path.stat().st_mtime for path in (leftover, *leftover.iterdir())) > time.time() - _KEPT
    return False


def _target(leftover: Path) -> str:
    """The name of the folder that was to be written."""
    return leftover.name.removesuffix(_RESUMABLE).rpartition(".")[0].removeprefix(".")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A name in the same folder, of this process, that readers do not look at and `sweep` removes when it has died."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
