"""The numbers in stored tensors, and a quantised weight, which is computed from several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

Read = Callable[[str], "Stored"]
"""Name -> the stored tensor, without a copy."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it is in the file.

    Attributes:
        dtype: as safetensors names it.
        shape: its shape.
        bits: flat, unsigned whole numbers of the dtype's size.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: np.ndarray

    def floats(self) -> np.ndarray:
        """Return the values as a copy in fp32, in the tensor's shape; whole numbers keep their value."""
        if self.dtype == "BF16":
            found = (self.bits.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype in _TABLES:
            found = _TABLES[self.dtype]()[self.bits]
        else:
            found = self.bits.view(_NUMPY[self.dtype]).astype(np.float32)
        return found.reshape(self.shape)

    def words(self) -> np.ndarray:
        """Return the 32-bit words of packed numbers: uint32, in the tensor's shape."""
        return self.bits.view(np.uint32).reshape(self.shape)

    def bytes(self) -> np.ndarray:
        """Return the bytes: uint8, flat."""
        return self.bits.view(np.uint8)

    def whole(self) -> np.ndarray:
        """Return the values of a tensor of whole numbers: int64, in its shape."""
        return self.bits.view(_NUMPY[self.dtype]).astype(np.int64).reshape(self.shape)


@dataclass(frozen=True)
class Packed:
    """A weight that is computed from stored tensors.

    Attributes:
        parts: role -> name of the stored tensor; the first one holds most of the weight.
        shape: of the weight; `(elements,)` if it depends on the values of a part, which have not been read.
        decode: computes the weight in fp32, in its shape, from the stored parts by role.
        dtype: of the weight before its quantisation, as safetensors names it; empty if the parts do not say.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    decode: Callable[[Mapping[str, Stored]], np.ndarray]
    dtype: str = ""

    def values(self, read: Read) -> np.ndarray:
        """Compute the weight in fp32, in its shape."""
        return self.decode({role: read(name) for role, name in self.parts.items()})


_NUMPY = {
    **{"F64": "f8", "F32": "f4", "F16": "f2"},
    **{"I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "u1"},
}


@cache
def _e4m3() -> np.ndarray:
    """The 256 values of E4M3: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity (arXiv 2209.05433)."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7).astype(np.float32)
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(mantissa + 8, exponent - 10))
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


@cache
def _e5m2() -> np.ndarray:
    """The 256 values of E5M2: each code is the upper byte of an fp16 number."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


@cache
def _e8m0() -> np.ndarray:
    """The 256 values of E8M0: powers of two, with the exponent of an fp32 number (OCP Microscaling Formats, 2023)."""
    powers = np.ldexp(np.float32(1), np.minimum(np.arange(256), 254) - 127).astype(np.float32)
    powers[255] = np.nan
    return powers


_TABLES: dict[str, Callable[[], np.ndarray]] = {"F8_E4M3": _e4m3, "F8_E5M2": _e5m2, "F8_E8M0": _e8m0}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the 16 codes of E2M1, the 4-bit numbers of MXFP4 and NVFP4."""


def powers_of_two(stored: Stored) -> np.ndarray:
    """Return scales in fp32 that are stored as exponents of two, as F8_E8M0 or as bytes."""
    return _e8m0()[stored.bits].reshape(stored.shape)


def nibbles(codes: np.ndarray, table: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Decode the two 4-bit numbers of each byte: flat, fp32.

    Args:
        codes: uint8, flat.
        table: fp32, the values of the 16 codes.
        high_first: whether the upper four bits are the first number.
    """
    byte = np.arange(256)
    low, high = table[byte & 15], table[byte >> 4]
    pairs = np.stack([high, low] if high_first else [low, high], axis=1)
    return pairs[codes].reshape(-1)
