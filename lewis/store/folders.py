"""The folders of the store, and their access rights.

The store belongs to its owner: its folder has mode 0700 and its files 0600. To share it, give the folder to a group and
let the group write (`chgrp lab DIR; chmod 2770 DIR`): then folders are 0770 and files 0660. Other users have no access
in either case. A checkpoint's files are read-only, so that no program changes one by accident.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath

from lewis import settings
from lewis.errors import InputError
from lewis.store.scratch import beside

SERVICE_NOTE = "service.json"
"""Name of the file in the store in which `lewis up` notes its process and the addresses of its servers."""
_OTHERS, _ALL_BUT_OWNER = 0o007, 0o077


def home() -> Path:
    """The root of the store: the absolute path of `LEWIS_HOME`."""
    return settings.HOME.get()


def holds(path: Path) -> bool:
    """Whether a path is inside the store."""
    return path.absolute().is_relative_to(home())


def umask() -> int:
    """The mode bits that a file or folder of the store must not have."""
    with suppress(FileNotFoundError):
        if home().stat().st_mode & stat.S_IWGRP:
            return _OTHERS
    return _ALL_BUT_OWNER


def make_folder(folder: Path) -> Path:
    """Make a folder and its missing parents, and return it; inside the store, only its owner or group gets access.

    Raises:
        InputError: if there is a file in its place.
    """
    if not holds(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    place, absolute = home(), folder.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(place, 0o700)
    _close_to_others(place)
    missing = [each for each in (absolute, *absolute.parents) if each != place and each.is_relative_to(place)]
    for each in reversed(missing):
        _make(each)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of the store, there is a file; move it away")
    return folder


def _make(folder: Path) -> None:
    """Make one folder of the store, if it is missing.

    In a group's store it gets its name only after its mode: another user may be about to write into it, and the process
    that makes it may be killed between the two.
    """
    if not is_shared():
        with suppress(FileExistsError):
            os.mkdir(folder)
            restrict(folder)
    elif not os.path.lexists(folder):
        scratch = beside(folder)
        os.mkdir(scratch)
        restrict(scratch)
        try:
            os.rename(scratch, folder)
        except OSError:  # another process was faster
            os.rmdir(scratch)
            if not os.path.lexists(folder):
                raise


def make_shared_file(path: Path) -> None:
    """Make an empty file in a group's store, if it is missing; like a folder, it gets its name only after its mode."""
    if is_shared() and not os.path.lexists(path):
        scratch = beside(path)
        scratch.touch()
        restrict(scratch)
        with suppress(OSError):  # another process was faster, or there are no links here
            os.link(scratch, path)
        scratch.unlink()


def is_shared() -> bool:
    """Whether a group shares the store."""
    return umask() == _OTHERS


def restrict(path: Path) -> None:
    """Close a new file or folder of the store to others; where a group shares the store, give the group the owner's
    rights, whatever the umask of the process.
    """
    mode, closed = stat.S_IMODE(path.stat().st_mode), umask()
    shared = (mode & stat.S_IRWXU) >> 3 if closed == _OTHERS else 0
    if (wanted := (mode | shared) & ~closed) != mode:
        path.chmod(wanted)


def restrict_all(folder: Path) -> None:
    """Apply `restrict` to a new folder, and to all files and folders in it."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            restrict(path)


def make_read_only(path: Path) -> None:
    """Make a file of the store read-only."""
    path.chmod(0o440 & ~umask())


def private_folder(path: Path) -> Path:
    """Make a folder for this user alone in a place where all users may write, such as `/dev/shm`, and return it.

    Raises:
        InputError: if something is there that another user made, or could have written to.
    """
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _ALL_BUT_OWNER:
        raise InputError(
            f"{path}: expected a folder of this user with mode 0700, or none; there is something of user "
            f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}: remove it"
        )
    return path


def _close_to_others(place: Path) -> None:
    """Close an empty folder that becomes a store, or an older store that is open to others.

    A folder of another user keeps its mode, and so does one that held other files before: others may need those.
    """
    found = place.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.getuid() or mode & stat.S_ISVTX or not mode & umask():
        return
    with suppress(FileNotFoundError):
        if os.listdir(place) and not (place / "locks").stat().st_mode & umask():
            return  # the store is ours and closed, what else is there is not
        place.chmod(mode & ~umask())


def leads_out(name: str) -> bool:
    """Whether the name of a file in a folder, from an untrusted source, leads out of that folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts
