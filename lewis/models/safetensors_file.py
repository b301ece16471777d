"""One safetensors file, mapped into memory: tensors are views of it, and its pages come and go with their use."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lewis.errors import InputError, LewisError

_PART = 1 << 18  # numbers that are compared at a time
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Place:
    """A tensor of a file: dtype as safetensors names it, shape, first and last byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open file.

    Attributes:
        path: of the file.
        places: name -> where a tensor is.
    """

    def __init__(self, path: Path) -> None:
        """Open and check it; its tensors are not read.

        Raises:
            InputError: if it is truncated, or no safetensors file.
        """
        self.path = path
        try:
            with safe_open(path, framework="np") as checked:  # checks offsets, shapes and sizes
                names = list(checked.keys())
            self._file = path.open("rb")
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: truncated, or no safetensors file ({error}); download it again") from error
        self.places = {}
        for name in names:
            start, stop = header[name]["data_offsets"]
            shape = tuple(header[name]["shape"])
            self.places[name] = Place(header[name]["dtype"], shape, 8 + length + start, 8 + length + stop)

    def bits(self, name: str, width: int) -> np.ndarray:
        """A tensor's bits: flat, unsigned whole numbers of `width` bytes, a view of the file.

        Raises:
            LewisError: if they are gone; to touch them would end the process.
        """
        place = self.places[name]
        try:
            whole = os.fstat(self._file.fileno()).st_size >= place.stop
        except OSError as error:
            raise LewisError(f"{self.path}: cannot read {name!r}: {error.strerror}") from error
        if not whole:
            raise LewisError(f"{self.path}: cannot read {name!r}: the file was cut short while it was open")
        return np.frombuffer(self._map, _BITS[width], (place.stop - place.start) // width, place.start)

    def will_need(self, name: str) -> None:
        """Let the system read a tensor ahead."""
        self._advise(name, mmap.MADV_WILLNEED)

    def done_with(self, name: str) -> None:
        """Take a tensor's pages off this process; the system's cache of the file keeps them."""
        self._advise(name, mmap.MADV_DONTNEED)

    def _advise(self, name: str, advice: int) -> None:
        place = self.places[name]
        start = place.start - place.start % mmap.PAGESIZE
        if place.stop > start:
            self._map.madvise(advice, start, place.stop - start)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors of one dtype have the same bits."""
    starts = range(0, one.size, _PART)
    return one.size == other.size and all(np.array_equal(one[i : i + _PART], other[i : i + _PART]) for i in starts)
