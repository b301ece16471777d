"""The store's remote half (`LEWIS_STORE`), through which machines without a shared disk share their results.

`LEWIS_STORE` is a URL that fsspec opens, such as `s3://bucket/prefix`; the store under LEWIS_HOME is then a cache of
it. An entry is pushed when it is published, and fetched when a reader misses it. Object and file have the same name:

    importance/<digest>.json  grams/<digest>/lewis.json  scores/<digest>.json  ...

The head of an entry, the manifest of a folder or the JSON of an importance pass, has the checksums of its other
objects. It is written last and fetched first, and all objects are checked on arrival, before a local reader can see
them. So neither an incomplete upload nor a damaged object is ever used: the head of a damaged entry is removed, and the
entry is made and pushed again. Merged models are pushed only if `LEWIS_STORE_MERGED` is 1, since MLflow has the
registered ones. Remembered checksums are not pushed, since they hold for one disk.

A remote half that does not answer stops no run. An entry that could not be pushed is noted in `unpushed` in the store
and sent with a later entry.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from lewis import settings
from lewis.errors import InputError
from lewis.redact import redacted
from lewis.store import files, kinds
from lewis.store.files import MANIFEST
from lewis.store.folders import home, make_folder, make_read_only, restrict
from lewis.store.kinds import Kind
from lewis.store.scratch import beside
from lewis.store.sealed_json import DamagedError

logger = logging.getLogger(__name__)

_TRIES = 3
_WAIT = 2.0  # seconds between two tries
_SILENT = 30.0  # seconds for which a remote half that did not answer is not asked again
_RESEND = 600.0  # seconds after which another process sends an entry that was noted as unpushed
_asleep: dict[str, float] = {}  # URL -> when to ask again, as time.monotonic()
_looking: ContextVar["list[Found] | None"] = ContextVar("looking", default=None)


class Found(NamedTuple):
    """An entry that the remote half has: its path in the local store, and the bytes to fetch."""

    path: Path
    size: int


def url() -> str:
    """URL of the remote half (`LEWIS_STORE`); empty if there is none."""
    return settings.STORE.get()


def shares(path: Path) -> bool:
    """Whether an entry is pushed and fetched: there is a remote half, and the entry is of a kind that is shared."""
    return _shared_kind(path) is not None


def _shared_kind(path: Path) -> Kind | None:
    kind = kinds.kind_of(path) if url() else None
    if kind is None or kind.shared == "never" or (kind.shared == "merged" and not settings.STORE_MERGED.get()):
        return None
    return kind


def opened() -> tuple[Any, str]:
    """Return fsspec's file system for `LEWIS_STORE`, and the path of the store's root in it.

    Some file systems, such as that of FTP, connect to their server here, and raise errors of their own.

    Raises:
        InputError: if no such file system is installed, or the URL is malformed or lacks an option.
    """
    from fsspec.core import url_to_fs

    own = {"auto_mkdir": True} if url().startswith(("/", "file:", "local:")) else {}
    try:
        system, root = url_to_fs(url(), use_listings_cache=False, **own)
    except (ImportError, TypeError, ValueError) as error:
        fix = "expected a URL such as s3://bucket/prefix; for s3 install the extra `s3`"
        raise InputError(f"LEWIS_STORE: {redacted(url())} cannot be opened: {error}; {fix}") from error
    return system, root.rstrip("/")


@contextmanager
def looking() -> Iterator[list[Found]]:
    """Collect in a list, instead of fetching them, the entries with a manifest that the block would fetch.

    Entries of one file are fetched: they are small, and later entries are looked up by their content.
    """
    found = list[Found]()
    token = _looking.set(found)
    try:
        yield found
    finally:
        _looking.reset(token)


def fetch(path: Path) -> bool:
    """Fetch an entry from the remote half, if the local store lacks it.

    Args:
        path: the entry's path in the local store: a file, or a folder with a manifest.

    Returns:
        Whether it was fetched. False too, with a log message, if the remote half does not answer or has it damaged.

    Raises:
        InputError: as `opened`.
    """
    kind = _shared_kind(path)
    if kind is None or path.exists() or _sleeps():
        return False
    try:
        system, root = opened()
    except InputError:
        raise
    except Exception as error:
        _warn("fetched", path, error)
        return False
    there = f"{root}/{_name(path)}"
    try:
        head = system.cat_file(head_object(kind, there))
        if kind.manifest and (found := _looking.get()) is not None:
            found.append(Found(path, len(head) + sum(size for size, _ in kind.parts(path, head).values())))
            return False
        _arrive(system, kind, there, path, head)
    except FileNotFoundError:
        return False
    except DamagedError as error:
        logger.warning("%s/%s is damaged and made again: %s", redacted(url()), _name(path), error)
        with suppress(Exception):
            system.rm_file(head_object(kind, there))
        return False
    except Exception as error:  # each file system has errors of its own
        _warn("fetched", path, error)
        return False
    logger.info("fetched %s from %s", _name(path), redacted(url()))
    return True


def push(path: Path) -> bool:
    """Push an entry that was published, and entries that could not be pushed before.

    Returns:
        Whether the remote half has the entry now. A failure is logged, and a later call sends the entry again.

    Raises:
        InputError: as `opened`.
    """
    kind = _shared_kind(path)
    if kind is None:
        return False
    note = _note_of(path)
    with suppress(OSError):  # without a note an entry is not sent later, which stops no run
        files.write_bytes(note, b"")
    if _sleeps() or not _push(kind, path):
        return False
    for each in list(note.parent.glob("[!.]*")):
        if _sleeps():
            break
        with suppress(OSError):
            left = home() / each.name.replace("@", "/")
            its_kind = _shared_kind(left)
            if kinds.kind_of(left) is None or not left.exists():
                each.unlink()
            elif its_kind and each.stat().st_mtime < time.time() - _RESEND:
                _push(its_kind, left)
    return True


def _note_of(path: Path) -> Path:
    """Return the path of the note that an entry is to be pushed. Users of a group's store remove each other's notes."""
    return home() / "unpushed" / _name(path).replace("/", "@")


def _push(kind: Kind, path: Path) -> bool:
    for number in range(_TRIES):
        try:
            system, root = opened()
            _send(system, kind, f"{root}/{_name(path)}", path)
        except InputError:
            raise
        except DamagedError as error:  # the step that needs it makes and pushes it again
            logger.warning("%s is damaged and not pushed: %s", path, error)
            _forget(path)
            return False
        except Exception as error:
            if number + 1 < _TRIES:
                time.sleep(_WAIT * 2**number)
            else:
                _warn("pushed", path, error)
        else:
            _forget(path)
            return True
    return False


def _forget(path: Path) -> None:
    """Remove the note that an entry is to be pushed."""
    with suppress(OSError):
        _note_of(path).unlink()


def _send(system: Any, kind: Kind, there: str, path: Path) -> None:
    """Write all objects of an entry, its head last.

    Raises:
        DamagedError: if a file of the entry here is missing or has another size than the head says.
    """
    target = head_object(kind, there)
    parts, head = _whole(kind, path)
    with suppress(FileNotFoundError):
        if system.cat_file(target) == head:
            return
        system.rm_file(target)  # another writer's head must not be there with these files
    for name, size in parts.items():
        _put(system, kind.head_of(path).parent / name, f"{_above(target)}/{name}", size)
    _put(system, kind.head_of(path), target, len(head))


def _whole(kind: Kind, path: Path) -> tuple[dict[str, int], bytes]:
    """Return an entry's other files with their sizes in bytes, and its head; DamagedError: they are not all there."""
    head_path = kind.head_of(path)
    try:
        head = head_path.read_bytes()
        parts = {name: size for name, (size, _) in kind.parts(path, head).items()}
        found = {name: (head_path.parent / name).stat().st_size for name in parts}
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing") from error
    if wrong := next((name for name in parts if found[name] != parts[name]), None):
        raise DamagedError(f"{wrong}: expected {parts[wrong]} bytes, it has {found[wrong]}")
    return parts, head


def _put(system: Any, source: Path, target: str, size: int) -> None:
    """Write one object so that a reader sees all of it or nothing. Object stores do; files of a disk are renamed."""
    if _is_disk(system):
        with files.written_beside(Path(target)) as scratch:
            system.put_file(str(source), str(scratch))
    else:
        system.put_file(str(source), target)
    if (there := system.size(target)) != size:
        raise OSError(f"expected {size} bytes, it has {there}")


def create(system: Any, target: str, data: bytes) -> None:
    """Create an object if none has its name; of several concurrent writers, one succeeds.

    Object stores do that atomically. On a disk, fsspec would check first and write then, so that two could succeed.

    Raises:
        FileExistsError: if the object exists on a disk; each other file system has an error of its own.
        OSError: if the disk takes no writes; the object does not exist then.
    """
    if _is_disk(system):
        system.makedirs(_above(target), exist_ok=True)
        with open(target, "xb") as file:
            try:
                file.write(data)
                file.flush()
            except OSError:
                os.unlink(target)
                raise
    else:
        system.pipe_file(target, data, mode="create")


def _is_disk(system: Any) -> bool:
    return "file" in ([system.protocol] if isinstance(system.protocol, str) else system.protocol)


def _arrive(system: Any, kind: Kind, there: str, path: Path, head: bytes) -> None:
    """Fetch an entry whose head was fetched already to a scratch place, check it, and rename it to `path`."""
    parts = kind.parts(path, head)
    make_folder(path.parent)
    if (free := files.free_space(path.parent)) < (size := sum(size for size, _ in parts.values())):
        raise OSError(f"{settings.size_text(size)} to fetch, {settings.size_text(free)} free in {home()}")
    if not kind.manifest:
        for name, expected in parts.items():
            with files.written_beside(path.parent / name) as second:
                _get(system, f"{_above(there)}/{name}", second, *expected)
        files.write_bytes(path, head)
        return
    scratch = beside(path)
    try:
        scratch.mkdir()
        restrict(scratch)
        for name, expected in parts.items():
            make_folder((scratch / name).parent)
            _get(system, f"{there}/{name}", scratch / name, *expected)
            make_read_only(scratch / name)
        files.write_bytes(scratch / MANIFEST, head)
        try:
            os.replace(scratch, path)
        except OSError:
            if not path.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _get(system: Any, there: str, target: Path, size: int, sha256: str) -> None:
    try:
        system.get_file(there, str(target))
    except FileNotFoundError as error:
        raise DamagedError(f"{target.name} is missing") from error
    restrict(target)
    found = files.file_sha256(target)
    if target.stat().st_size != size or found != sha256:
        raise DamagedError(f"{target.name}: expected {size} bytes with SHA-256 {sha256}, got {found}")


def _name(path: Path) -> str:
    return path.absolute().relative_to(home()).as_posix()


def head_object(kind: Kind, there: str) -> str:
    """Return the path of the head of the remote entry at `there`; without this object there is no entry."""
    return f"{there}/{MANIFEST}" if kind.manifest else there


def _above(there: str) -> str:
    return there.rpartition("/")[0]


def _sleeps() -> bool:
    return _asleep.get(url(), 0.0) > time.monotonic()


def _warn(what: str, path: Path, error: Exception) -> None:
    _asleep[url()] = time.monotonic() + _SILENT
    text = redacted(f"{type(error).__name__}: {error}")
    logger.warning("LEWIS_STORE: %s was not %s, the run goes on without: %s", _name(path), what, text)
