"""Write a checkpoint: the files are laid out first from names, dtypes and shapes, then filled tensor by tensor.

Beside them lies a journal of what is finished, until all is: a writer of the same layout that finds what a process left
that died (kill -9, power) goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lewis.errors import InputError, LewisError
from lewis.lazy_torch import torch
from lewis.models.checkpoint import DTYPES, INDEX, SINGLE
from lewis.models.journal import Journal

SIZES = {name: size for name, (_, size) in DTYPES.items()}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_JOURNAL = "journal.jsonl"
_FLUSH = 1 << 26  # bytes after which the disk is told to write
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DONATED = (
    *("generation_config.json", "*.jinja", "chat_template.json", "tokenizer*", "*.model", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def parse_size(text: str) -> int:
    """`"5GB"` in bytes (decimal units, as transformers' `max_shard_size`).

    Raises:
        InputError: if it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[(match[2] or "").removeprefix("B")]) if match else 0
    if size <= 0:
        raise InputError(f"max_shard_size: expected a size such as 5GB or 500MB, got {text!r}")
    return size


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: the file, and the bytes from `start` to `stop` in it."""

    file_name: str
    file: IO[bytes]
    start: int
    stop: int


class CheckpointWriter:
    """Safetensors files whose tensors may be written in any order.

    Use as a context manager; leave it only when each tensor of the layout has been written.

    Attributes:
        names: the tensors in the order of their places in the files; to write them so is best.
        finished: those that an earlier process wrote; they need not be written again.
        checksums: SHA-256 (64 hex digits) of each weight file, when all is written.
    """

    def __init__(self, folder: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], max_shard_size: int) -> None:
        """Lay the files out.

        Args:
            folder: empty, or as a writer with these same arguments left it that was killed; whoever calls sees to that.
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
        shards = _shards({name: _size(dtype, shape) for name, (dtype, shape) in layout.items()}, max_shard_size)
        names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards))
        self._journal = Journal(folder / _JOURNAL)
        for file_name, members in zip(names, shards, strict=True):
            self._lay_out(file_name, members)
        if len(shards) > 1:
            total = sum(_size(dtype, shape) for dtype, shape in layout.values())
            weight_map = {tensor: file for file, members in zip(names, shards, strict=True) for tensor in members}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor of the layout; it must have the dtype and shape that were laid out.

        Raises:
            LewisError: if the disk is full, or fails.
        """
        dtype, shape = self._layout[name]
        if tensor.dtype != getattr(torch, DTYPES[dtype][0]) or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: laid out as {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        self.write_bytes(name, bytes_of(tensor))

    def write_bytes(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Write a part of one tensor, `offset` bytes after its beginning; threads may write at the same time.

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
        """Note that a tensor is written, and all before it in `names` are; one thread at a time.

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
        """Let the disk write while the next tensors are merged; one thread waits for it."""
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
                flush.result()  # the system tells of a failure once
            for file in self._files:
                os.fsync(file.fileno())
            self._journal.remove()
        self._journal.close()
        for file in self._files:
            file.close()

    def _lay_out(self, file_name: str, members: list[str]) -> None:
        # Wide dtypes first keeps each tensor aligned to its own size, as the safetensors library does.
        members = sorted(members, key=lambda name: -SIZES[self._layout[name][0]])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in members:
            dtype, shape = self._layout[name]
            start, end = end, end + _size(dtype, shape)
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


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in the order in which a file has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_config(config: Mapping[str, Any], donor: Path, folder: Path, dtype: str | None) -> None:
    """Write config.json with the dtype of the weights.

    Args:
        config: the base's.
        donor: the folder `config` was read from; its file is copied byte by byte where nothing changes.
        folder: where to write.
        dtype: the one dtype of all floating tensors as safetensors names it, or None if they differ.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    name = _NAMES.get(dtype or "")
    if name:
        keys = [key for key in ("dtype", "torch_dtype") if key in changed] or ["torch_dtype"]
        changed.update(dict.fromkeys(keys, name))
        for inner in changed.values():
            if isinstance(inner, dict):
                inner.update({key: name for key in ("dtype", "torch_dtype") if inner.get(key)})
    if changed == config:
        shutil.copyfile(donor / "config.json", folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n")


def copy_tokenizer(donor: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation_config of `donor`, byte by byte."""
    for path in tokenizer_files(donor):
        shutil.copyfile(path, folder / path.name)


def tokenizer_files(donor: Path) -> list[Path]:
    """What `copy_tokenizer` copies."""
    return sorted({path for pattern in DONATED for path in donor.glob(pattern) if path.is_file()})


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return SIZES[dtype] * math.prod(shape)


def _shard_names(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
