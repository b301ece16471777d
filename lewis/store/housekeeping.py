"""Housekeeping: what of the store nobody needs any more, and its removal.

Needed is what was used lately, which `store.mark_used` notes, and what a registered version was made from or scored
with. All else can be made again. Left alone are what MLflow and Prefect own, locks, notes of runs, the demo (recipes
name paths in it) and whatever this module does not know.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import Timeout

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.importance import measured
from lewis.registry import tracking, versions

logger = logging.getLogger(__name__)

DAYS = 14.0  # what was used within as many days is kept
RECENT = 3600.0  # seconds; what was used within them is kept whatever the days
_DAY = 86400.0
_LOG_OF = re.compile(r"-(\d+)\.log$")  # the process that writes it


class _Kind(NamedTuple):
    """Entries of one kind: where they are in the kind's folder, the prefix of their locks, why they are not kept."""

    pattern: str
    lock: str = ""
    why: str = ""


_NOT_MADE_FROM = ", no registered version was made from it"
_KINDS = {
    "merged": _Kind("*", "merged-", ", not registered"),
    "importance": _Kind("*.json", "importance-", _NOT_MADE_FROM),
    "allocations": _Kind("*.json", "allocation-", _NOT_MADE_FROM),
    "calibrations": _Kind("*.json", why=_NOT_MADE_FROM),
    "scores": _Kind("*.json", "scores-", ", not of a registered version or what it was made from"),
    "digests": _Kind("*.json"),
    "pictures": _Kind("*.png"),
    "datasets": _Kind("*/*"),  # the library keeps what it built from a file in <builder>/<config>
    "logs": _Kind("*.log"),
}


@dataclass(frozen=True)
class Removable:
    """Something in the store that nobody needs.

    Attributes:
        path: a file or a folder.
        kind: the folder of the store that it is in, or `partial` for what a dead process left half-written.
        bytes: that its removal frees; those of weights which MLflow links too are not freed.
        last_used: Unix time in seconds; the real last use is at most `store.MARK_EVERY` later.
        why: it is not needed, in words.
    """

    path: Path
    kind: str
    bytes: int
    last_used: float
    why: str


def survey(days: float = DAYS, *, now: float | None = None, active_since: float | None = None) -> list[Removable]:
    """Find what can be removed; changes nothing.

    Args:
        days: what was used within as many days is kept.
        now: Unix time in seconds; by default the clock's.
        active_since: start of the oldest run that is going on (Unix time, seconds), or None: what was used since is
            kept, and so is what does not note its use.

    Raises:
        InputError: if `days` is no number from 0 up.
        TransientError: if MLflow, which knows the registered versions, does not answer.
        LewisError: if MLflow refuses.
    """
    if not days >= 0:
        raise InputError(f"days: expected a number from 0 up, got {days}")
    now = time.time() if now is None else now
    recent = min(now - RECENT, now if active_since is None else active_since) - store.MARK_EVERY
    unused = min(recent, now - days * _DAY - store.MARK_EVERY)
    running, needed = active_since is not None, _needed()
    found = [item for kind in _KINDS for item in _entries(kind, needed, now, unused, running)]
    lost = {item.path for item in found}
    return [*found, *_records(lost, now, recent, unused, running), *_leftovers(recent)]


def remove(items: list[Removable]) -> int:
    """Remove what `survey` found, except what is in use by now; gives the bytes freed.

    Raises:
        LewisError: if something could not be removed; the rest is.
    """
    freed, failures = 0, []
    for item in items:
        try:
            freed += _remove(item)
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            failures.append(f"{item.path}: {error.strerror}")
    if failures:
        raise LewisError(
            f"{len(failures)} of {len(items)} entries could not be removed (the rest is: {freed / 1e9:.3f} GB); "
            f"the first: {failures[0]}; run it as the owner of the store"
        )
    return freed


@dataclass(frozen=True)
class _Needed:
    """Digests of the registered merges, identities of all that they were made from, their mean densities."""

    merges: set[str]
    inputs: set[str]
    means: list[dict[str, float]]

    def includes(self, kind: str, path: Path) -> bool:
        """Whether a registered version is an entry, was made from it or scored with it."""
        if kind in ("merged", "calibrations"):
            return path.stem in (self.merges if kind == "merged" else self.inputs)
        content = store.read_json(path) if kind in ("importance", "allocations", "scores") else None
        if not isinstance(content, dict):
            return False
        if kind == "importance":
            return {content.get("model"), content.get("calibration")} <= self.inputs
        if kind == "scores":
            return content.get("model") in self.inputs | self.merges
        experts = content.get("experts") or {}  # an allocation does not say which merge it is for
        return {ref: fields.get("mean") for ref, fields in experts.items()} in self.means


def _needed() -> _Needed:
    tags: list[dict[str, str]] = []
    # Without a database nothing was registered, and a look should not create one.
    if os.environ.get("MLFLOW_TRACKING_URI") or (store.home() / "mlflow" / "mlflow.db").exists():
        with tracking.client("listing the registered versions") as client:
            token: str | None = None
            while token is None or token:
                page = client.search_model_versions(max_results=1000, page_token=token)
                tags += [version.tags for version in page]
                token = page.token or ""
    merges = {each["lewis.digest"] for each in tags if each.get("lewis.digest")}
    inputs = {value for each in tags for key, value in each.items() if key.startswith(versions.SOURCE)}
    manifests = [store.read_json(store.home() / "merged" / digest / store.MANIFEST) or {} for digest in merges]
    return _Needed(merges, inputs, [found["mean_density"] for found in manifests if found.get("mean_density")])


def _entries(kind: str, needed: _Needed, now: float, unused: float, running: bool) -> Iterator[Removable]:
    if kind == "datasets" and running:  # they note no use
        return
    for path in sorted((store.home() / kind).glob(_KINDS[kind].pattern)):
        if path.name.startswith(".") or (kind == "merged" and not (path / store.MANIFEST).is_file()):
            continue  # being written, or none of ours
        writer = _LOG_OF.search(path.name) if kind == "logs" else None
        if writer and store.is_alive(int(writer[1])):  # it may be silent for days
            continue
        with suppress(FileNotFoundError):  # another process removes it
            used = _last_used(kind, path)
            if used < unused and not needed.includes(kind, path):
                beside = measured.moments_path(path)
                size = _size(path) + (_size(beside) if kind == "importance" and beside.is_file() else 0)
                yield Removable(path, kind, size, used, _ago(now, used) + _KINDS[kind].why)


def _records(lost: set[Path], now: float, recent: float, unused: float, running: bool) -> Iterator[Removable]:
    """Prefect's notes of what is done: those of what is gone or goes, and those that were not used."""
    for path in sorted((store.home() / "results").glob("[!.]*")):
        with suppress(FileNotFoundError):
            used = _last_used("results", path)
            if any(target in lost or not target.exists() for target in _targets(path)):
                if path.stat().st_mtime < recent:
                    yield Removable(path, "results", _size(path), used, "the result that it refers to is gone or goes")
            elif used < unused and not running:  # a model's files outside the store note no use
                yield Removable(path, "results", _size(path), used, _ago(now, used))


def _leftovers(recent: float) -> Iterator[Removable]:
    home = store.home()
    for path in sorted([*home.glob(".*.partial"), *home.glob("*/.*.partial")]):
        if path.parent.name in ("mlflow", "prefect") or not store.is_abandoned(path):
            continue
        with suppress(FileNotFoundError):
            used = _last_used("partial", path)
            if used < recent:  # else a process of another machine, on a shared file system, may still write
                yield Removable(path, "partial", _size(path), used, "left half-written by a process that died")


def _remove(item: Removable) -> int:
    try:
        with _locked(item):
            taken = _take(item)
    except Timeout:
        taken = None
    if taken is None:
        logger.info("%s: in use by now, kept", item.path)
        return 0
    freed = _size(taken) + _beside(item)
    shutil.rmtree(taken) if taken.is_dir() else taken.unlink()
    return freed


def _beside(item: Removable) -> int:
    """Remove the second moments of a measurement; gives the bytes freed."""
    moments = measured.moments_path(item.path)
    if item.kind != "importance" or not moments.is_file():
        return 0
    freed = moments.stat().st_size
    moments.unlink(missing_ok=True)
    return freed


def _locked(item: Removable) -> AbstractContextManager[Any]:
    """The lock under which the pipeline looks for an entry and makes it; raises Timeout if a run holds it."""
    kind = _KINDS.get(item.kind)
    return store.lock(kind.lock + item.path.stem).acquire(timeout=0) if kind and kind.lock else nullcontext()


def _take(item: Removable) -> Path | None:
    """Rename an entry out of the readers' sight; None if it was used since the survey."""
    if _last_used(item.kind, item.path) > item.last_used:
        return None
    taken = store.beside(item.path)
    os.rename(item.path, taken)
    if _last_used(item.kind, taken) > item.last_used:  # a reader without the lock came just before the renaming
        os.rename(taken, item.path)
        return None
    return taken


def _last_used(kind: str, path: Path) -> float:
    """Unix time in seconds. A record counts as used when what it refers to in the store is."""
    if kind == "results":
        marks = [_mark(target) for target in _targets(path) if target.is_relative_to(store.home())]
        return max([path.stat().st_mtime, *(mark.stat().st_mtime for mark in marks if mark.exists())])
    if kind in ("datasets", "partial"):
        return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    return _mark(path).stat().st_mtime


def _mark(path: Path) -> Path:
    """The file whose time `store.mark_used` renews."""
    return path / store.MANIFEST if path.is_dir() else path


def _targets(record: Path) -> list[Path]:
    """The files and folders that a task's result refers to."""
    content: Any = store.read_json(record)
    try:
        found = json.loads(content["result"])
        named = []
        for fields in [each["data"] for each in (found if isinstance(found, list) else [found])]:
            named += [fields.get("path"), fields.get("folder"), fields.get("adapter"), *fields.get("sizes", ())]
    except (ValueError, KeyError, TypeError, AttributeError):  # none of ours
        return []
    return [Path(name) for name in named if name]


def _size(path: Path) -> int:
    files = [each.lstat() for each in (path.rglob("*") if path.is_dir() else (path,)) if not each.is_dir()]
    return sum(stat.st_size for stat in files if stat.st_nlink == 1)


def _ago(now: float, used: float) -> str:
    days = (now - used) / _DAY
    return f"not used for {days:.0f} days" if days >= 2 else f"not used for {24 * days:.0f} hours"
