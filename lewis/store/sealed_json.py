"""JSON files that carry their own checksum, which shows whether a file was cut or changed.

The first line is `{"checksum": "sha256:<64 hex digits>",` and covers every byte after it; the file is plain JSON. In a
file that grows line by line, each line is an object that holds the checksum of its other keys.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.input_files import open_regular

_FIRST_LINE = re.compile(rb'\{"checksum": "sha256:([0-9a-f]{64})",')


class DamagedError(ValueError):
    """A file is not as it was written; the message names the file, what was expected and what is there."""


def dumps(content: Mapping[str, Any], indent: int | None = 2) -> str:
    """JSON text of an object that is not empty, with its checksum in the first line."""
    if not content:
        raise ValueError("expected an object that holds something")
    rest = json.dumps(content, indent=indent, ensure_ascii=False)[1:].lstrip("\n") + "\n"
    return f'{{"checksum": "sha256:{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'


def loads(data: bytes) -> dict[str, Any]:
    """Check the bytes that `dumps` made, and return the object that it was given.

    Raises:
        DamagedError: if the bytes are not as `dumps` made them.
    """
    first, _, rest = data.partition(b"\n")
    found = _FIRST_LINE.fullmatch(first)
    if found is None:
        raise DamagedError("expected a checksum in its first line" if data else "it is empty")
    if hashlib.sha256(rest).hexdigest().encode() != found[1]:
        raise DamagedError("its content is not what its checksum says")
    content: dict[str, Any] = json.loads(data)
    del content["checksum"]
    return content


def read(path: Path) -> dict[str, Any]:
    """Read a file that `dumps` made; returns and raises as `loads`.

    Raises:
        DamagedError: also if something else than a file is there, such as a FIFO, which would wait for a writer.
        OSError: if it cannot be opened.
    """
    try:
        with open_regular(path) as file:
            return loads(file.read())
    except InputError as error:
        raise DamagedError(str(error)) from error


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with its checksum added, for one line of a file that grows line by line."""
    return {**content, "checksum": _canonical(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Check an object that `sealed` made, and return it without its checksum.

    Raises:
        DamagedError: if the checksum is missing or does not fit.
    """
    rest = dict(content)
    if rest.pop("checksum", None) != _canonical(rest):
        raise DamagedError("its content is not what its checksum says")
    return rest


def check_lines(data: bytes) -> None:
    """Check a file each of whose lines is an object that `sealed` made.

    Raises:
        DamagedError: naming the first line that is damaged.
    """
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            if not line.endswith(b"\n"):
                raise DamagedError("it is cut off: it has no line end")
            unsealed(json.loads(line))
        except (ValueError, TypeError) as error:
            raise DamagedError(f"line {number}: {error}") from error


def _canonical(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
