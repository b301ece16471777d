"""Write a checkpoint: the files are laid out first from names, dtypes and shapes, then filled tensor by tensor.

A journal beside the files records which tensors are finished. If the process is killed, the next writer with the same
arguments reads it and goes on from there. When all is written, the journal is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lewis.errors import LewisError
from lewis.lazy_torch import torch
from lewis.models.dtypes import DTYPES, bytes_of, size_of, torch_dtype
from lewis.models.files import INDEX, SINGLE
from lewis.models.journal import Journal
from lewis.models.shards import divide, shard_names

_JOURNAL = "journal.jsonl"
_FLUSH = 1 << 26  # bytes after which the disk is told to write


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: the file, and its bytes `start` to `stop` (exclusive) in it."""

    file_name: str
    file: IO[bytes]
    start: int
    stop: int


class CheckpointWriter:
    """Safetensors files whose tensors may be written in any order.

    Use it as a context manager. The block must write every tensor of the layout before it ends.

    Attributes:
        names: the tensors in the order of the files; writing in this order is fastest.
        finished: the tensors that an earlier process wrote; they need not be written again.
        checksums: file -> SHA-256 (64 hex digits), after the block.
    """

    def __init__(self, folder: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], max_shard_size: int) -> None:
        """Lay the files out.

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
        names = [SINGLE] if len(shards) == 1 else shard_names(len(shards))
        self._journal = Journal(folder / _JOURNAL)
        for file_name, members in zip(names, shards, strict=True):
            self._lay_out(file_name, members)
        if len(shards) > 1:
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
        """Record that a tensor is written, and all before it in `names` too. Only one thread may call it at a time.

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
        """Start writing to the disk, in a thread, while the next tensors are merged."""
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
