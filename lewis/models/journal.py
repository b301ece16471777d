"""The journal of a checkpoint that is being written: how far each of its files is written, with SHA-256 checksums.

A note says that the first N bytes of a file have this SHA-256. A writer that takes over the same files hashes them from
the start and compares at each note: a file is trusted up to the last note that matches before the first that does not.
The same pass over the bytes gives the checksums of the finished files.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO

_BUFFER = 1 << 20  # bytes that are read at a time


class Journal:
    """The notes on the files of one folder. Only one thread may use it at a time."""

    def __init__(self, path: Path) -> None:
        """Read the notes of an earlier process at `path`, if there are any; new ones are appended."""
        self._path, self._known = path, _read(path)
        self._notes = path.open("ab", buffering=0)
        self._prefixes: dict[str, _Prefix] = {}

    def begin(self, name: str, file: IO[bytes]) -> int:
        """Start with a file whose header is written.

        Returns:
            How many of its first bytes are as an earlier process noted them.

        Raises:
            OSError: if the file cannot be read.
        """
        prefix, whole = _Prefix(file), 0
        for stop, sha256 in sorted(self._known.get(name, {}).items()):
            further = prefix.copy()
            if further.read_to(stop) != sha256:
                break
            prefix, whole = further, stop
        self._prefixes[name] = prefix
        return whole

    def note(self, name: str, stop: int) -> None:
        """Note that the first `stop` bytes of a file are written; `stop` must not be less than before.

        Raises:
            OSError: if they cannot be read, or the note cannot be written.
        """
        self._notes.write(json.dumps([name, stop, self._prefixes[name].read_to(stop)]).encode() + b"\n")

    def checksums(self) -> dict[str, str]:
        """File -> SHA-256 (64 hex digits) of all its bytes.

        Raises:
            OSError: if one cannot be read.
        """
        return {name: prefix.read_to(None) for name, prefix in self._prefixes.items()}

    def remove(self) -> None:
        """Remove the notes, once the files are complete."""
        self.close()
        self._path.unlink()

    def close(self) -> None:
        """Close the notes and keep them, for another process."""
        self._notes.close()


class _Prefix:
    """The first bytes of a file, hashed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._stop, self._sha256 = file, 0, hashlib.sha256()

    def copy(self) -> _Prefix:
        other = _Prefix(self._file)
        other._stop, other._sha256 = self._stop, self._sha256.copy()
        return other

    def read_to(self, stop: int | None) -> str:
        """Read on to byte `stop`, or to the end; returns the SHA-256 of all bytes so far."""
        buffer = memoryview(bytearray(_BUFFER))
        while stop is None or self._stop < stop:
            wanted = _BUFFER if stop is None else min(_BUFFER, stop - self._stop)
            count = os.preadv(self._file.fileno(), [buffer[:wanted]], self._stop)
            if count == 0:
                break
            self._sha256.update(buffer[:count])
            self._stop += count
        return self._sha256.hexdigest()


def _read(path: Path) -> dict[str, dict[int, str]]:
    """File -> number of bytes -> their SHA-256. Lines that are no notes are skipped."""
    known: dict[str, dict[int, str]] = {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            name, stop, sha256 = json.loads(line)
            known.setdefault(name, {})[int(stop)] = sha256
        except (ValueError, TypeError):  # the process died while it wrote this line
            continue
    return known
