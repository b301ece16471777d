"""Check before any work, by trying, that LEWIS can write to the store, and a command to its output.

The file `format` in the store holds the number of its format. The number is raised when this version can no longer
read an older store; `_MIGRATIONS` then has the function that converts one. A step that computes something differently
than before does not change the format: it raises its own `SEMANTICS`, and then finds no entries made before.
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
from lewis.store import entries, files, kinds
from lewis.store.folders import make_folder

FORMAT = 1
_MIGRATIONS: dict[int, Callable[[], None]] = {}
"""Format -> function that converts a store of this format to the next one; it can be repeated after a kill."""
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
_ROOM = 64  # characters by which a scratch name is longer than the final name


def check_store() -> None:
    """Check that the store can be written to, and has this version's format; make it if it is missing.

    Raises:
        InputError: if one of them fails; the message names LEWIS_HOME.
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
    """Convert a store of an older format to the current one; a store without a number counts as the first format.

    Raises:
        InputError: if a newer version of LEWIS made the store.
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
    """Return the number of the store's format; 0 if its file is missing or damaged."""
    found = files.read_json(files.home() / "format")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0


def _write_format(number: int) -> None:
    files.write_text(files.home() / "format", json.dumps(number) + "\n")


def of_the_disk(error: BaseException | None) -> bool:
    """Whether an error is due to a full or read-only disk: `explained` then says all, and a traceback adds nothing."""
    return isinstance(error, OSError) and error.errno in (*files.FULL, errno.EROFS)


def explained(error: OSError) -> str:
    """Return an OSError's message, with the place to free space, or LEWIS_HOME if the store cannot be written to."""
    place = str(error.filename or "")
    home = str(files.home())
    if error.errno in files.FULL:
        return (
            f"{error}; free space where {f'{place} is' if place else f'the store {home} and the temporary folder are'}"
        )
    if error.errno in _REFUSED and (place == home or place.startswith(home + os.sep)):
        return f"LEWIS_HOME: the store {home} cannot be written to: {error}"
    return str(error)


def check_output_folder(folder: Path, option: str = "-o") -> Path:
    """Check that a folder can be made, or replaced, at a place that the user gives by an option or an argument.

    Returns:
        Its absolute path.

    Raises:
        InputError: if it cannot, holds files that LEWIS did not write, or lies in one of the store's own folders.
    """
    with _named(folder, option):
        place = folder.expanduser().resolve()
        str(place).encode()  # raises for a name that is no UTF-8
        home = files.home()
        if any(place.is_relative_to(home / each) for each in (*kinds.TABLE, *kinds.FOREIGN)):
            raise InputError(
                f"{option} {folder}: lies in the store {home}, whose folders LEWIS keeps and cleans up itself; choose "
                "a path outside of it"
            )
        entries.check_replaceable(place)
        _try(place)
    return place


def check_output_file(file: Path, option: str = "-o") -> Path:
    """Check that a file can be written at a place that the user gives by an option.

    Returns:
        Its absolute path.

    Raises:
        InputError: if it cannot, or the path is that of a folder or a device.
    """
    with _named(file, option):
        place = file.expanduser().resolve()
        if place.exists() and not place.is_file():
            raise InputError(
                f"{option} {file}: expected the name of a file, got a folder or a device; choose another path"
            )
        _try(place)
    return place


def _try(place: Path) -> None:
    """Check that output can be written next to `place`, where it lies before it is renamed; leave nothing there."""
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
def _named(given: Path, option: str) -> Iterator[None]:
    """Turn errors in a block into an InputError that names the path which the user gave."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle, or ~nobody
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{option} {given}: cannot be written: {why}; choose another path") from error
