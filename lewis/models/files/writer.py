"""Write a checkpoint: the files are laid out first from names, dtypes and shapes, then filled tensor by tensor.

A journal next to the files records which tensors are finished. Each of its notes gives the SHA-256 of the first N bytes
of a file. If the process is killed, the next writer with the same arguments hashes the files from the start and
compares at each note: a file is trusted up to the last note that matches before the first that does not. The same pass
over the bytes gives the checksums of the finished files. When all is written, the journal is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lewis import settings
from lewis.errors import InputError, LewisError
from lewis.lazy_torch import torch
from lewis.models.dtypes import DTYPES, bytes_of, size_of, torch_dtype
from lewis.models.files.folder import INDEX, SINGLE

_JOURNAL = "journal.jsonl"
_FLUSH = 1 << 26  # bytes after which a flush to disk starts
_BUFFER = 1 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: the file, and its bytes `start` to `stop` (exclusive) in it."""

    file_name: str
    file: IO[bytes]
    start: int
    stop: int


class CheckpointWriter:
    """A writer of safetensors files that takes their tensors in any order.

    Use it as a context manager. The block must write every tensor of the layout before it ends.

    Attributes:
        names: the tensors in the order of the files; writing in this order is fastest.
        finished: the tensors that an earlier process wrote; they need not be written again.
        checksums: file -> SHA-256 (64 hex digits), after the block.
    """

    def __init__(self, folder: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], max_shard_size: int) -> None:
        """Create the files with their headers, and find the tensors that an earlier process has finished.

        Args:
            folder: must be empty, or left by a killed writer with the same arguments; the caller ensures this.
            layout: tensor name -> dtype (as safetensors names it) and shape.
            max_shard_size: bytes; a larger tensor gets a file of its own.
        """
        self.folder, self._layout = folder, dict(layout)
        self.names: list[str] = []
        self.finished: set[str] = set()
        self.checksums: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self._files: list[IO[bytes]] = []
        self._flusher, self._flushes, self._unflushed = ThreadPoolExecutor(1), list[Future[None]](), 0
        shards = divide({name: size_of(dtype, shape) for name, (dtype, shape) in layout.items()}, max_shard_size)
        count = len(shards)  # the files of several are named as transformers names them
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._journal = Journal(folder / _JOURNAL)
        for file_name, members in zip(names, shards, strict=True):
            self._lay_out(file_name, members)
        if count > 1:
            total = sum(size_of(dtype, shape) for dtype, shape in layout.values())
            weight_map = {tensor: file for file, members in zip(names, shards, strict=True) for tensor in members}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor of the layout.

        Raises:
            ValueError: if its dtype or shape differs from the layout.
            LewisError: if the disk is full, or fails.
        """
        dtype, shape = self._layout[name]
        if tensor.dtype != torch_dtype(dtype) or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: laid out as {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        self.write_bytes(name, bytes_of(tensor))

    def write_bytes(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Write a part of one tensor, `offset` bytes after its start. Several threads may write at the same time.

        Raises:
            LewisError: if the disk is full, or fails.
        """
        place = self._places[name]
        offset += place.start
        while data:
            try:
                written = os.pwrite(place.file.fileno(), data, offset)
            except OSError as error:
                raise LewisError(
                    f"{self.folder.parent}: cannot write {name!r}: {error.strerror}; free space"
                ) from error
            data, offset = data[written:], offset + written

    def finish(self, name: str) -> None:
        """Record that a tensor, and all before it in `names`, are written. Only one thread may call it at a time.

        Raises:
            LewisError: if the disk is full, or fails.
        """
        place = self._places[name]
        try:
            self._journal.note(place.file_name, place.stop)
            self._flush(place)
        except OSError as error:
            raise LewisError(f"{self.folder.parent}: cannot finish {name!r}: {error.strerror}; free space") from error

    def _flush(self, place: _Place) -> None:
        """Start to flush a file to disk, in a thread, while the next tensors are merged."""
        self._unflushed += place.stop - place.start
        if self._unflushed >= _FLUSH and all(flush.done() for flush in self._flushes):
            self._unflushed = 0
            self._flushes.append(self._flusher.submit(os.fdatasync, place.file.fileno()))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._flusher.shutdown()
        if kind is None:
            self.checksums = self._journal.checksums()
            for flush in self._flushes:
                flush.result()  # raises what failed: the system reports a failed write only once
            for file in self._files:
                os.fsync(file.fileno())
            self._journal.remove()
        self._journal.close()
        for file in self._files:
            file.close()

    def _lay_out(self, file_name: str, members: list[str]) -> None:
        # Large elements come first, as in the safetensors library: so each tensor is aligned to its elements' size.
        members = sorted(members, key=lambda name: -DTYPES[self._layout[name][0]].size)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in members:
            dtype, shape = self._layout[name]
            start, end = end, end + size_of(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self.folder / file_name
        path.touch()
        file = path.open("r+b", buffering=0)
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        whole = self._journal.begin(file_name, file)
        for name in members:
            start, stop = (8 + len(text) + offset for offset in header[name]["data_offsets"])
            self._places[name] = _Place(file_name, file, start, stop)
            self.names.append(name)
            if stop <= whole:
                self.finished.add(name)


class Journal:
    """The notes on how far the files of one folder are written. Only one thread may use a journal at a time."""

    def __init__(self, path: Path) -> None:
        """Read the notes of an earlier process at `path`, if there are any; new ones are appended."""
        self._path, self._known = path, _read(path)
        self._notes = path.open("ab", buffering=0)
        self._prefixes: dict[str, _Prefix] = {}

    def begin(self, name: str, file: IO[bytes]) -> int:
        """Add a file whose header is written, and compare its content with the notes of an earlier process.

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
    """The SHA-256 of the first bytes of a file, which can be extended by further bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._stop, self._sha256 = file, 0, hashlib.sha256()

    def copy(self) -> _Prefix:
        other = _Prefix(self._file)
        other._stop, other._sha256 = self._stop, self._sha256.copy()
        return other

    def read_to(self, stop: int | None) -> str:
        """Read on to byte `stop` (None: the end of the file), and return the SHA-256 of all bytes so far."""
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
    """Read a journal: file -> number of its first bytes -> their SHA-256. Lines that are no notes are skipped."""
    known: dict[str, dict[int, str]] = {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            name, stop, sha256 = json.loads(line)
        except (ValueError, TypeError):  # the process died while it wrote this line
            continue
        if isinstance(name, str) and isinstance(stop, int):
            known.setdefault(name, {})[stop] = sha256
    return known


def parse_size(text: str) -> int:
    """Return the bytes that a size such as `5GB` stands for (decimal units, as transformers' `max_shard_size`).

    Raises:
        InputError: if the text is no such size.
    """
    try:
        return settings.parse_size(text)
    except ValueError:
        raise InputError(f"max_shard_size: expected a size such as 5GB or 500MB, got {text!r}") from None


def divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Divide tensors among files; return the tensors of each file, in their order.

    Args:
        sizes: tensor -> bytes.
        limit: bytes of a file; a larger tensor gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
