"""Scratch files and folders, which do not outlive their process for long, however it ends.

In the store a scratch path names its writer. A store may be shared by machines, by containers and over restarts, so a
process number alone says nothing: a writer is known by host name, boot id, PID namespace and process number. Whether
a writer lives can be checked only from the same host, boot and namespace. Scratch paths of other writers are judged by
their age.

A temporary folder elsewhere is locked by the process that made it, and the kernel frees the lock when that process
dies. The next process that makes such a folder removes folders that no process holds; so does each run of a recipe,
since it may find all its steps done and make no folder.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AGE = 86400.0  # seconds without a change after which the path of a writer that cannot be checked is abandoned
_BESIDE = re.compile(r"\.(?P<name>.+)\.(?P<writer>(?:[0-9a-f]{12}|unknown)-\d+)\.(?P<earlier>earlier_)?\w+\.partial")
_FOLDER = "lewis-tmp-"  # how the names of temporary folders begin
_MADE, _NEW = f"{_FOLDER}new-", 60.0  # how names begin until folders are locked; seconds that this takes at most


def writer() -> str:
    """Name this process in file names: 12 hex digits for host, boot and PID namespace, a dash, and the process id."""
    return f"{_place() or 'unknown'}-{os.getpid()}"


def system() -> str:
    """Name the running system: a digest of this host, a dash, and the boot id; empty where there is no boot id."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    host = hashlib.sha256(f"{os.uname().nodename}\n{_read('/etc/machine-id')}".encode()).hexdigest()[:12]
    return f"{host}-{boot}" if boot else ""


def has_restarted(name: str) -> bool:
    """Whether this host was started again since one of its processes, now dead, was given `name` by `system`."""
    (host, _, boot), (our_host, _, our_boot) = name.partition("-"), system().partition("-")
    return host == our_host and boot != our_boot


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def beside(path: Path, *, earlier: bool = False) -> Path:
    """A scratch path in the same folder. Readers ignore it, and `sweep` removes it once this process is dead.

    Args:
        path: what is written, or replaced.
        earlier: whether what is at `path` is set aside there while it is replaced, so that `sweep` may put it back.
    """
    mark = "earlier_" if earlier else ""
    return path.with_name(f".{path.name}.{writer()}.{mark}{uuid.uuid4().hex[:8]}.partial")


def writer_of(path: Path) -> str | None:
    """The writer of a scratch path; None if another program has named the path."""
    found = _BESIDE.fullmatch(path.name)
    return found["writer"] if found else None


def place_of(path: Path) -> Path | None:
    """The place from which a file or folder was set aside to `path` while it is replaced; None for other paths."""
    found = _BESIDE.fullmatch(path.name)
    return path.with_name(found["name"]) if found and found["earlier"] else None


def is_dead(name: str, left: Path) -> bool:
    """Whether a writer is dead.

    Args:
        name: the result of `writer` in its process; any other text is a writer that cannot be checked.
        left: the file or folder that it writes. A writer that cannot be checked counts as dead when nothing in there
            has changed for `AGE`.
    """
    place, _, number = name.rpartition("-")
    if place and place == _place() and number.isdecimal():
        return not _is_alive(int(number))
    with suppress(OSError):  # it is gone, or being renamed
        return max(path.lstat().st_mtime for path in (left, *left.rglob("*"))) < time.time() - AGE
    return False


def _place() -> str | None:
    """Digest of host, boot and PID namespace of this process; None where the system does not report the last two."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        facts = [os.uname().nodename, boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return None
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, as another user
    return True


def remove_abandoned() -> None:
    """Remove all temporary folders that dead processes of this user made by `scratch_folder` and left."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(OSError):  # another process was faster
            if _is_abandoned(path):
                shutil.rmtree(path)


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Give an empty folder where the system has its temporary files (`TMPDIR`); it is removed at the end of the block.

    Folders that dead processes left are removed first.
    """
    remove_abandoned()
    parent = Path(tempfile.gettempdir())
    made = Path(tempfile.mkdtemp(prefix=f"{_MADE}{purpose}-"))
    held = _locked(made)
    try:
        ours = made.rename(parent / made.name.replace(_MADE, _FOLDER, 1))
        try:
            with tempfile.TemporaryDirectory(dir=ours) as name:  # which removes also what is read-only in it
                yield Path(name)
        finally:
            shutil.rmtree(ours, ignore_errors=True)
    finally:
        os.close(held)


def _locked(folder: Path) -> int:
    """Lock a folder, and return the file descriptor that holds the lock.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _is_abandoned(folder: Path) -> bool:
    found = folder.lstat()
    is_new = folder.name.startswith(_MADE) and found.st_mtime > time.time() - _NEW
    if found.st_uid != os.getuid() or is_new:
        return False
    os.close(_locked(folder))
    return True
