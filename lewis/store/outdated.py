"""Find and remove old entries in the store's remote half that are no longer needed."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lewis.errors import InputError, LewisError, TransientError
from lewis.redact import redacted
from lewis.store import kinds, remote
from lewis.store.housekeeping import Needed
from lewis.store.kinds import Kind
from lewis.store.scratch import scratch_folder

_MOST = 20000  # days, since about 1970
_ROUNDED = 1.0  # seconds by which an object's time in a list may differ from the time in its own metadata


@dataclass(frozen=True)
class Outdated:
    """An old run in Prefect or MLflow, or an old entry in the remote half of the store, that is no longer needed.

    Attributes:
        where: `prefect`, `mlflow` or `remote store`.
        what: description, for people.
        key: the run's id, or the first part of the names of the entry's objects.
        time: when the run ended or the entry was written, Unix time in seconds.
        bytes: how many bytes its removal frees; 0 if unknown.
    """

    where: str
    what: str
    key: str
    time: float
    bytes: int = 0


def check_days(days: float) -> None:
    """Check the age in days up to which everything is kept.

    Raises:
        InputError: if `days` is not at least 1, or more than there is of time.
    """
    if not 1 <= days <= _MOST:
        raise InputError(f"days: expected a number from 1 to {_MOST}, got {days}")


def entries(before: float, needed: Mapping[str, Needed]) -> list[Outdated]:
    """List old entries of `LEWIS_STORE` that this machine has not used lately and no registered version needs.

    Args:
        before: entries that were written before this time are old (Unix time in seconds).
        needed: as for `housekeeping.survey`.

    Raises:
        TransientError: if the remote half does not answer.
        InputError: as `remote.opened`.
    """
    if not remote.url():
        return []
    with _answering(), scratch_folder("outdated") as scratch:
        system, root = remote.opened()
        return [
            Outdated("remote store", f"{kind.name}/{digest[:16]}", f"{kind.name}/{digest}", time, size)
            for kind, digest, time, size in _entries(system, root)
            if time < before
            and not _used_since(kind, digest, before)
            and not _needed(system, root, kind, digest, needed.get(kind.name), scratch)
        ]


def remove(found: Outdated) -> None:
    """Remove all objects of an entry, its head first; an entry that was written again in the meantime is kept.

    The list of a bucket may be out of date, so the time of writing is read again, from the metadata of the head.

    Raises:
        TransientError: if the remote half does not answer.
    """
    name, _, digest = found.key.partition("/")
    kind = kinds.TABLE[name]
    with _answering():
        system, root = remote.opened()
        entry = f"{root}/{name}/{kind.path(digest).name}"
        head = remote.head_object(kind, entry)
        with suppress(FileNotFoundError):  # an upload that broke off has no head
            if _modified(system, head, system.info(head)) > found.time + _ROUNDED:
                return
            system.rm_file(head)
        with suppress(FileNotFoundError):  # another process was faster
            if kind.manifest:
                system.rm(entry, recursive=True)
            elif kind.beside:
                system.rm_file(f"{root}/{found.key}{kind.beside}")


def _entries(system: Any, root: str) -> Iterator[tuple[Kind, str, float, int]]:
    """Yield each remote entry's kind, digest, time at which its newest object was written, and bytes of all objects."""
    for kind in (kind for kind in kinds.TABLE.values() if kind.shared != "never"):
        try:
            objects = system.find(f"{root}/{kind.name}", detail=True)
        except FileNotFoundError:
            continue
        found: dict[str, tuple[float, int]] = {}
        for path, info in objects.items():
            first = path[path.rindex(f"/{kind.name}/") + len(kind.name) + 2 :].partition("/")[0]
            if first.startswith("."):
                continue  # half-written on a disk
            digest = first if kind.manifest else first.partition(".")[0]
            time, size = found.get(digest, (0.0, 0))
            found[digest] = max(time, _modified(system, path, info)), size + int(info.get("size") or 0)
        yield from ((kind, digest, time, size) for digest, (time, size) in sorted(found.items()))


def _modified(system: Any, path: str, info: Mapping[str, Any]) -> float:
    """Return when an object was written, as Unix time in seconds; each file system has its own key for it."""
    time = next((info[key] for key in ("LastModified", "last_modified", "updated", "mtime") if info.get(key)), None)
    if not isinstance(time, datetime | float | int):
        time = system.modified(path)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def _used_since(kind: Kind, digest: str, before: float) -> bool:
    with suppress(OSError):
        return kind.head_of(kind.path(digest)).stat().st_mtime >= before
    return False


def _needed(system: Any, root: str, kind: Kind, digest: str, needed: Needed | None, scratch: Path) -> bool:
    """Whether a registered version needs a remote entry. `Needed` may read its manifest, so the head is fetched."""
    if needed is None:
        return False
    path = scratch / kind.name / kind.path(digest).name
    head = kind.head_of(path)
    head.parent.mkdir(parents=True, exist_ok=True)
    try:
        head.write_bytes(system.cat_file(remote.head_object(kind, f"{root}/{kind.name}/{path.name}")))
    except FileNotFoundError:
        return False  # an upload that broke off long ago
    try:
        return needed.includes(path)
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _answering() -> Iterator[None]:
    """Turn errors of the remote half in a block into a TransientError."""
    try:
        yield
    except LewisError:
        raise
    except Exception as error:  # each file system has errors of its own
        text = redacted(f"{type(error).__name__}: {error}")
        raise TransientError(f"LEWIS_STORE: {redacted(remote.url())} does not answer: {text}") from error
