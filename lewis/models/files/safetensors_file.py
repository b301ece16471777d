"""Read a safetensors file through a memory map, and write one, both without a copy of its tensors."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.input_files import check_regular
from lewis.lazy_torch import torch
from lewis.models.dtypes import bits_dtype, bytes_of, name_of

_LONGEST_NAME, _MOST_DIMENSIONS, _LARGEST_SIZE = 1000, 8, 1 << 40  # limits for a tensor of any model
_PART = 1 << 18  # elements that are compared at a time
_MOST_OPEN = 10240  # files; macOS allows no higher limit

Headers = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype as safetensors names it ("BF16"), shape


@dataclass(frozen=True)
class Place:
    """A tensor of a file: its dtype as safetensors names it, its shape, and its bytes `start` to `stop` (exclusive)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file.

    Attributes:
        path: of the file.
        places: tensor -> where it is.
    """

    def __init__(self, path: Path, rename: Callable[[str], str] | None = None) -> None:
        """Open a file and check its header; its tensors are not read.

        Args:
            path: of the file.
            rename: name in the file -> what the tensor is called here; by default the same.

        Raises:
            InputError: if it cannot be opened, is truncated or no safetensors file, or two of its tensors get the same
                name.
        """
        self.path = path
        check_regular(path)
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with safe_open(path, framework="np") as checked:  # checks offsets, shapes and sizes
                names = list(checked.keys())
            length = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + length])
        except OSError as error:
            raise InputError(f"{path}: cannot be opened: {error.strerror or error}") from error
        except (SafetensorError, RecursionError, ValueError) as error:
            raise InputError(f"{path}: truncated, or no safetensors file ({error}); download it again") from error
        self.places: dict[str, Place] = {}
        for name in names:
            start, stop = header[name]["data_offsets"]
            shape = tuple(header[name]["shape"])
            _check_tensor(path, name, shape)
            called = rename(name) if rename else name
            if called in self.places:
                raise InputError(f"{path}: two of its tensors are {called!r}, one with a wrapper's prefix; keep one")
            self.places[called] = Place(header[name]["dtype"], shape, 8 + length + start, 8 + length + stop)

    def bits(self, name: str) -> np.ndarray:
        """A tensor's bits: flat, unsigned whole numbers of the dtype's size, a view of the file.

        Raises:
            LewisError: if the file has since been cut short. Without this check the system would kill the process.
        """
        place = self.places[name]
        try:
            whole = self._map.size() >= place.stop
        except OSError as error:
            raise LewisError(f"{self.path}: cannot read {name!r}: {error.strerror}") from error
        if not whole:
            raise LewisError(f"{self.path}: cannot read {name!r}: the file was cut short while it was open")
        kind = bits_dtype(place.dtype)
        return np.frombuffer(self._map, kind, (place.stop - place.start) // kind.itemsize, place.start)

    def will_need(self, name: str) -> None:
        """Ask the operating system to load a tensor from disk before it is read."""
        self._advise(name, mmap.MADV_WILLNEED)

    def done_with(self, name: str) -> None:
        """Unmap a tensor's pages from this process; they stay in the system's cache of the file."""
        self._advise(name, mmap.MADV_DONTNEED)

    def _advise(self, name: str, advice: int) -> None:
        place = self.places[name]
        start = place.start - place.start % mmap.PAGESIZE
        if place.stop > start:
            self._map.madvise(advice, start, place.stop - start)


def allow_many_open() -> None:
    """Let this process have as many files open as the system allows it: a model takes one for each of its shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < (most := min(hard, _MOST_OPEN)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def write_file(path: Path, tensors: Mapping[str, Sequence[torch.Tensor]], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, which appears whole or not at all, without a copy of its tensors in memory.

    Args:
        path: of the file; an earlier one is replaced.
        tensors: name -> the parts of a tensor along its first dimension, of one dtype that a checkpoint may hold.
        metadata: texts for the header.

    Returns:
        The SHA-256 of the file.
    """
    entries, stop = dict[str, object](__metadata__=dict(metadata)), 0
    for name, parts in tensors.items():
        shape, start = [sum(len(part) for part in parts), *parts[0].shape[1:]], stop
        stop += parts[0].dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": name_of(parts[0].dtype), "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    hashed = hashlib.sha256()
    with store.written_beside(path) as scratch, scratch.open("wb") as file:
        content: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        content += [bytes_of(part) for parts in tensors.values() for part in parts]
        for data in content:
            file.write(data)
            hashed.update(data)
        file.flush()
        os.fsync(file.fileno())
    return hashed.hexdigest()


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors of one dtype have the same bits."""
    starts = range(0, one.size, _PART)
    return one.size == other.size and all(np.array_equal(one[i : i + _PART], other[i : i + _PART]) for i in starts)


def file_headers(path: Path) -> Headers:
    """Return dtype and shape of each tensor in a safetensors file, which is read again only when it changes.

    Raises:
        InputError: if it is damaged.
    """
    check_regular(path)
    try:
        now = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return _headers(path, now.st_ino, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=64)
def _headers(path: Path, *_: int) -> Headers:
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        found = {key: (tensor.get_dtype(), tuple(tensor.get_shape())) for key, tensor in slices.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error
    for key, (_, shape) in found.items():
        _check_tensor(path, key, shape)
    return found


def _check_tensor(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Raise InputError for a name or shape that no model has: torch and numpy cannot make such a tensor."""
    if len(name) > _LONGEST_NAME:
        raise InputError(f"{path}: {name[:60]!r}...: the name of a tensor has {len(name)} characters; is it a model?")
    if len(shape) > _MOST_DIMENSIONS or any(size >= _LARGEST_SIZE for size in shape):
        raise InputError(
            f"{path}: {name!r} has {len(shape)} dimensions of up to {max(shape)}; no model has such a tensor"
        )
