"""Find out before any work whether this version may write to the store, and a command where it writes to: by trying.

The file `format` in the store has a number. It is raised when a store of the version before can no longer be read as it
is; `_MIGRATIONS` then has what brings an older store up to date. What one step computes otherwise than before is no
matter of the format: such a step raises its own `SEMANTICS`, and finds no entry of the version before.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lewis.errors import InputError
from lewis.store import entries, files
from lewis.store.folders import make_folder

FORMAT = 1
_MIGRATIONS: dict[int, Callable[[], None]] = {}
"""Format -> what turns a store of it into one of the next format; it can be repeated after a kill."""
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 64  # characters that a scratch name has more than the name it stands for


def check_store() -> None:
    """Check that the store can be written to, and is of this version; it is made if it is missing.

    Raises:
        InputError: naming LEWIS_HOME.
    """
    home = files.home()
    try:
        make_folder(home)
        os.rmdir(tempfile.mkdtemp(prefix=".lewis-", dir=home))
        check_format()
    except (OSError, InputError) as error:
        why = error if isinstance(error, InputError) else error.strerror
        raise InputError(
            f"LEWIS_HOME: the store {home} cannot be written to: {why}; set it to a folder that can"
        ) from error


def check_format() -> None:
    """Bring a store of an older version up to date; a new one, and one without a number, is of the first format.

    Raises:
        InputError: if a newer version made it.
    """
    if (found := _read_format()) == FORMAT:
        return
    with files.lock("format"):
        found = _read_format()
        if found > FORMAT:
            raise InputError(
                f"LEWIS_HOME: the store {files.home()} has the format {found}, this version of LEWIS knows {FORMAT}: a "
                "newer version made it; install that, or set LEWIS_HOME to another folder"
            )
        for number in range(max(found, 1), FORMAT):
            _MIGRATIONS[number]()
            _write_format(number + 1)
        if found == 0:
            _write_format(FORMAT)


def _read_format() -> int:
    """The number; 0 without a file, or with one that is damaged."""
    found = files.read_json(files.home() / "format")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0


def _write_format(number: int) -> None:
    files.write_text(files.home() / "format", json.dumps(number) + "\n")


def of_the_disk(error: BaseException | None) -> bool:
    """Whether a disk is full or read-only: `explained` says all about it, and a traceback adds nothing."""
    return isinstance(error, OSError) and error.errno in (*_FULL, errno.EROFS)


def explained(error: OSError) -> str:
    """The message of an OSError; if its path is in the store, it names LEWIS_HOME."""
    place = str(error.filename or "")
    home = str(files.home())
    if error.errno in _FULL:
        return f"{error}; free space where {place or f'the store {home} and the temporary folder are'}"
    if error.errno in _REFUSED and (place == home or place.startswith(home + os.sep)):
        return f"LEWIS_HOME: the store {home} cannot be written to: {error}"
    return str(error)


def check_output_folder(folder: Path) -> Path:
    """Check that a folder can be made, or replaced, at a place that the user gives.

    Returns:
        Its absolute path.

    Raises:
        InputError: if it cannot, or holds something else.
    """
    with _named(folder):
        place = folder.expanduser().resolve()
        str(place).encode()  # raises for a name that is no UTF-8
        entries.check_replaceable(place)
        _try(place)
    return place


def check_output_file(file: Path) -> Path:
    """Check that a file can be written at a place that the user gives.

    Returns:
        Its absolute path.

    Raises:
        InputError: if it cannot, or something is there that is no regular file.
    """
    with _named(file):
        place = file.expanduser().resolve()
        if place.exists() and not place.is_file():
            raise InputError(f"-o {file}: expected the name of a file, got a folder or a device; choose another path")
        _try(place)
    return place


def _try(place: Path) -> None:
    """Try to write next to `place`, where output is written before it is renamed; removes what it wrote."""
    missing = [place.name]
    above = place.parent
    while not above.exists():
        missing, above = [above.name, *missing], above.parent
    made = Path(tempfile.mkdtemp(prefix=".lewis-", dir=above))
    try:
        (made / Path(*missing[:-1]) / f"{missing[-1]}{'.' * _ROOM}").mkdir(parents=True)
    finally:
        shutil.rmtree(made)


@contextmanager
def _named(given: Path) -> Iterator[None]:
    """Raise what goes wrong in a block as an InputError that names what the user gave."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle, or ~nobody
        why = getattr(error, "strerror", None) or error
        raise InputError(f"-o {given}: cannot be written: {why}; choose another path") from error
