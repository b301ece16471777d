"""Housekeeping: find the entries of the store that are no longer needed, and remove them.

An entry is needed if it was used lately, which `store.mark_used` notes, or if the caller says so (`Needed`). All other
entries can be made again. Housekeeping keeps files of other programs, locks, notes of runs, the demo (recipes name
paths in it) and everything else that is not of a removable kind.
"""

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.settings import size_text
from lewis.store import kinds
from lewis.store.kinds import Kind

logger = logging.getLogger(__name__)

DAYS = 14.0  # by default, entries that were used in the last 14 days are kept
RECENT = 3600.0  # seconds; entries that were used in the last hour are always kept
_DAY = 86400.0
_PARTIAL = Kind("partial", notes_use=False)  # what a dead process left half-written


class Needed(NamedTuple):
    """Which entries of one kind are needed, however long ago they were used.

    Attributes:
        includes: says whether the entry at a path is needed.
        otherwise: why an entry that is not included may go, such as `, not registered`; it follows the words that say
            for how long the entry was not used.
    """

    includes: Callable[[Path], bool]
    otherwise: str


@dataclass(frozen=True)
class Removable:
    """A file or folder of the store that is no longer needed.

    Attributes:
        path: a file or a folder.
        kind: the name of its kind, or `partial` if a dead process left it half-written.
        bytes: how much its removal frees; weights that MLflow links to as well free nothing.
        last_used: Unix time in seconds; the real last use is at most `store.MARK_EVERY` later.
        why: the reason why it is not needed, in words.
    """

    path: Path
    kind: str
    bytes: int
    last_used: float
    why: str


def survey(days: float = DAYS, *, needed: Mapping[str, Needed], active_since: float | None = None) -> list[Removable]:
    """Find what can be removed; changes nothing.

    Args:
        days: entries used in the last `days` days are kept.
        needed: kind's name -> which of its entries are kept whenever they were last used. For the entries of registered
            versions, `lewis.registry.retention.by_versions` gives it.
        active_since: when the oldest unfinished run began (Unix time in seconds); None if none is unfinished. Entries
            used since then are kept, and all entries of kinds that do not note their use.

    Raises:
        InputError: if `days` is negative or NaN.
    """
    if not days >= 0:
        raise InputError(f"days: expected a number from 0 up, got {days}")
    now = time.time()
    recent = min(now - RECENT, now if active_since is None else active_since) - store.MARK_EVERY
    unused = min(recent, now - days * _DAY - store.MARK_EVERY)
    found = list[Removable]()
    for kind in (kind for kind in kinds.TABLE.values() if kind.removable):
        limit = unused if kind.notes_use or active_since is None else -math.inf
        found += _entries(kind, needed.get(kind.name), {item.path for item in found}, now, recent, limit)
    return [*found, *_leftovers(recent)]


def remove(items: list[Removable]) -> int:
    """Remove what `survey` found, unless it has been used since then; return the bytes freed.

    Raises:
        LewisError: if something could not be removed; everything else is removed.
    """
    freed, failures = 0, []
    for item in items:
        try:
            freed += _remove(item, kinds.TABLE.get(item.kind, _PARTIAL))
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            failures.append(f"{item.path}: {error.strerror}")
    if failures:
        raise LewisError(
            f"{len(failures)} of {len(items)} entries could not be removed (the rest is: {size_text(freed)}); "
            f"the first: {failures[0]}; run it as the owner of the store"
        )
    return freed


def _entries(
    kind: Kind, needed: Needed | None, lost: set[Path], now: float, recent: float, unused: float
) -> Iterator[Removable]:
    """Yield a kind's entries to remove: not used since `unused`, or referring to files that are gone or in `lost`."""
    for path in kind.entries():
        if not kind.head_of(path).exists():
            continue  # LEWIS did not write it
        writer = re.search(kind.writer, path.name) if kind.writer else None
        if writer and not store.is_dead(writer[1], path):
            continue
        with suppress(FileNotFoundError):  # another process removes it
            used, why = _last_used(kind, path), ""
            if any(target in lost or not target.exists() for target in _targets(kind, path)):
                why = "the result that it refers to is gone or goes" if path.stat().st_mtime < recent else ""
            elif used < unused and not (needed and needed.includes(path)):
                why = _ago(now, used) + (needed.otherwise if needed else "")
            if why:
                yield Removable(path, kind.name, sum(map(_size, kind.files_of(path))), used, why)


def sweep() -> None:
    """Remove what dead processes left half-written in the store; `store.sweep` says what is kept for a day."""
    for folder in _folders():
        with suppress(OSError):  # a folder of another user
            store.sweep(folder)


def _folders() -> list[Path]:
    """The store's own folder, and those in it that LEWIS writes to."""
    home = store.home()
    return [home, *(folder for folder in home.glob("*/") if folder.name not in kinds.FOREIGN)]


def _leftovers(recent: float) -> Iterator[Removable]:
    for path in sorted(path for folder in _folders() for path in folder.glob(".*.partial")):
        if not store.is_abandoned(path):
            continue
        with suppress(FileNotFoundError):
            used = _last_used(_PARTIAL, path)
            if used < recent:  # a younger one may be written by another machine on a shared file system
                yield Removable(path, _PARTIAL.name, _size(path), used, "left half-written by a process that died")


def _remove(item: Removable, kind: Kind) -> int:
    try:
        # The lock under which a step looks for an entry and makes it.
        with kind.lock(item.path.stem).acquire(timeout=0) if kind.locks else nullcontext():
            taken = _take(item, kind)
    except Timeout:
        taken = None
    if taken is None:
        logger.info("%s: in use by now, kept", item.path)
        return 0
    second = kind.files_of(item.path)[1:]
    freed = sum(map(_size, [taken, *second]))
    for path in (*second, taken):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return freed


def _take(item: Removable, kind: Kind) -> Path | None:
    """Rename an entry so that no reader finds it, and return its new path; None if it was used since the survey."""
    if _last_used(kind, item.path) > item.last_used:
        return None
    taken = store.beside(item.path)
    os.rename(item.path, taken)
    if _last_used(kind, taken) > item.last_used:  # a reader without the lock used it just before it was renamed
        os.rename(taken, item.path)
        return None
    return taken


def _last_used(kind: Kind, path: Path) -> float:
    """Return when an entry, or one that it refers to, was last used, as Unix time in seconds."""
    if kind.refers_to:
        marks = [_mark(target) for target in _targets(kind, path) if target.is_relative_to(store.home())]
        return max([path.stat().st_mtime, *(mark.stat().st_mtime for mark in marks if mark.exists())])
    if not kind.notes_use:
        return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    return kind.head_of(path).stat().st_mtime


def _targets(kind: Kind, path: Path) -> list[Path]:
    return kind.refers_to(path) if kind.refers_to else []


def _mark(target: Path) -> Path:
    """Return the file of an entry whose modification time `store.mark_used` renews."""
    kind = kinds.kind_of(target)
    return kind.head_of(target) if kind else target


def _size(path: Path) -> int:
    files = [each.lstat() for each in (path.rglob("*") if path.is_dir() else (path,)) if not each.is_dir()]
    return sum(stat.st_size for stat in files if stat.st_nlink == 1)


def _ago(now: float, used: float) -> str:
    days = (now - used) / _DAY
    return f"not used for {days:.0f} days" if days >= 2 else f"not used for {24 * days:.0f} hours"
