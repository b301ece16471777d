"""Read files that a user gives: only regular ones, within limits of size and depth.

Opening a FIFO would wait for a writer, and a device may have no end, so both are refused before they are opened.
"""

import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from lewis.errors import InputError

MAX_JSON = 128 << 20  # bytes; the index of a model of 100,000 tensors has 10 MB, a large tokenizer 40 MB
MAX_DEPTH = 100  # blocks within blocks
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: Path) -> None:
    """Raise InputError if a path exists and is no regular file; a symbolic link counts as its target."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):  # it does not exist or is not accessible: opening it raises the error
        return
    if kind != stat.S_IFREG:
        raise InputError(f"{path}: is {_KINDS.get(kind, 'no regular file')}; expected a regular file")


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        InputError: if it is no regular file.
        OSError: if it cannot be opened.
    """
    check_regular(path)
    # Non-blocking, so that a FIFO that takes the file's place meanwhile does not block either.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: is no longer a regular file; run again")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        InputError: if it is no regular file, or larger.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path}: expected at most {limit:,} bytes, got more; is this the right file?")
    return content


def read_text(path: Path, limit: int) -> str:
    """Return the text of a UTF-8 file of at most `limit` bytes.

    Raises:
        InputError: if it is no regular file, larger, or not UTF-8.
        OSError: if it cannot be read.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from error


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Return the value in a JSON file of at most `limit` bytes.

    Raises:
        InputError: if it is no regular file, too large, no JSON, nested too deep, or has text that is no Unicode.
        OSError: if it cannot be read.
    """
    text = read_text(path, limit)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise _too_deep(path)
    if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}: holds one half of a surrogate pair, {error.object[error.start]!r}") from error
    return value


def _too_deep(path: Path) -> InputError:
    return InputError(f"{path}: not readable as JSON: nested more than {MAX_DEPTH} deep; is this the right file?")


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        blocks = [each for each in level if isinstance(each, dict | list)]
        if not blocks:
            return False
        level = [inner for each in blocks for inner in (each.values() if isinstance(each, dict) else each)]
    return True
