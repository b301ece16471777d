"""Old entries of the store's remote half that nothing needs: find them, and remove them."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lewis.errors import LewisError, TransientError
from lewis.redact import redacted
from lewis.store import kinds, remote
from lewis.store.housekeeping import Needed
from lewis.store.kinds import Kind
from lewis.store.scratch import scratch_folder

_ROUNDED = 1.0  # seconds by which the time that is said of one object may differ from the time in a list


@dataclass(frozen=True)
class Outdated:
    """Something that is old and that nothing needs.

    Attributes:
        where: `prefect`, `mlflow` or `remote store`.
        what: in words.
        key: its id there, or the first part of the names of its objects.
        time: when it ended or was written, Unix time in seconds.
        bytes: that its removal frees; 0 if that is not known.
    """

    where: str
    what: str
    key: str
    time: float
    bytes: int = 0


def entries(before: float, needed: Mapping[str, Needed]) -> list[Outdated]:
    """The entries of `LEWIS_STORE` that were written before a time, that this machine has not used since, and that no
    registered version needs; none without a remote half.

    Args:
        before: Unix time in seconds.
        needed: as of `housekeeping.survey`.

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
    """Remove all objects of an entry, its head first; an entry that was written again stays.

    The bucket may have listed it as it was before. What it says of one object is not from a list.

    Raises:
        TransientError: if the remote half does not answer.
    """
    name, _, digest = found.key.partition("/")
    kind = kinds.TABLE[name]
    with _answering():
        system, root = remote.opened()
        entry = f"{root}/{name}/{kind.path(digest).name}"
        head = remote.head_object(kind, entry)
        with suppress(FileNotFoundError):  # an upload that was broken off has none
            if _modified(system, head, system.info(head)) > found.time + _ROUNDED:
                return
            system.rm_file(head)
        with suppress(FileNotFoundError):  # somebody else was quicker
            if kind.manifest:
                system.rm(entry, recursive=True)
            elif kind.beside:
                system.rm_file(f"{root}/{found.key}{kind.beside}")


def _entries(system: Any, root: str) -> Iterator[tuple[Kind, str, float, int]]:
    """For each entry its kind, its digest, when its newest object was written, and the bytes of all objects."""
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
    """Unix time in seconds; each file system names it in its own way."""
    time = next((info[key] for key in ("LastModified", "last_modified", "updated", "mtime") if info.get(key)), None)
    if not isinstance(time, datetime | float | int):
        time = system.modified(path)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def _used_since(kind: Kind, digest: str, before: float) -> bool:
    with suppress(OSError):
        return kind.head_of(kind.path(digest)).stat().st_mtime >= before
    return False


def _needed(system: Any, root: str, kind: Kind, digest: str, needed: Needed | None, scratch: Path) -> bool:
    """Whether a registered version needs an entry. `Needed` may read manifests, which are fetched for that."""
    if needed is None:
        return False
    path = scratch / kind.name / kind.path(digest).name
    head = kind.head_of(path)
    head.parent.mkdir(parents=True, exist_ok=True)
    try:
        head.write_bytes(system.cat_file(remote.head_object(kind, f"{root}/{kind.name}/{path.name}")))
    except FileNotFoundError:
        return False  # an upload that was broken off long ago
    try:
        return needed.includes(path)
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _answering() -> Iterator[None]:
    """Raise what the remote half raises in a block as a TransientError."""
    try:
        yield
    except LewisError:
        raise
    except Exception as error:  # each file system has errors of its own
        text = redacted(f"{type(error).__name__}: {error}")
        raise TransientError(f"LEWIS_STORE: {redacted(remote.url())} does not answer: {text}") from error
