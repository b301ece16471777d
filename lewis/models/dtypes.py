"""The dtypes that a checkpoint may hold: the one table of their names, sizes and bits.

Safetensors calls a dtype `BF16`, config.json and torch call it `bfloat16`. In this project a dtype is named as
safetensors names it, unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lewis.lazy_torch import torch


@dataclass(frozen=True)
class Dtype:
    """A dtype of tensors in a checkpoint.

    Attributes:
        torch_name: what torch and config.json call it.
        size: bytes per element.
        floating: whether tensors of it are merged; all others are copied from the base.
    """

    torch_name: str
    size: int
    floating: bool = False


DTYPES = {
    "F64": Dtype("float64", 8, floating=True),
    "F32": Dtype("float32", 4, floating=True),
    "F16": Dtype("float16", 2, floating=True),
    "BF16": Dtype("bfloat16", 2, floating=True),
    "I64": Dtype("int64", 8),
    "I32": Dtype("int32", 4),
    "I16": Dtype("int16", 2),
    "I8": Dtype("int8", 1),
    "U8": Dtype("uint8", 1),
    "BOOL": Dtype("bool", 1),
    "F8_E4M3": Dtype("float8_e4m3fn", 1),
    "F8_E5M2": Dtype("float8_e5m2", 1),
    "F8_E8M0": Dtype("float8_e8m0fnu", 1),
}
EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0")  # parts of quantised weights, never merged as they are
MERGED = {DTYPES[name].torch_name: name for name in ("F32", "F16", "BF16")}  # of merged weights: torch's name -> ours


def torch_dtype(dtype: str) -> torch.dtype:
    """Torch's object for a dtype."""
    found: torch.dtype = getattr(torch, DTYPES[dtype].torch_name)
    return found


def name_of(dtype: torch.dtype) -> str:
    """Return the name that safetensors has for a torch dtype."""
    return next(name for name, each in DTYPES.items() if f"torch.{each.torch_name}" == str(dtype))


def bits_dtype(dtype: str) -> np.dtype:
    """Return numpy's unsigned integer type of a dtype's size: tensors are passed as bits, as numpy has no bfloat16."""
    return np.dtype(f"u{DTYPES[dtype].size}")


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor with this dtype and shape."""
    return DTYPES[dtype].size * math.prod(shape)


def as_tensor(dtype: str, bits: np.ndarray) -> torch.Tensor:
    """Return the flat tensor that has these bits, and shares their memory."""
    return torch.from_numpy(bits).view(torch_dtype(dtype))


def bits_of(tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """The dtype of a tensor, and its flat bits, of `bits_dtype`."""
    dtype = name_of(tensor.dtype)
    return dtype, np.frombuffer(bytes_of(tensor), bits_dtype(dtype))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in the order in which a safetensors file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
