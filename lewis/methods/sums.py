"""Sums in one order, the same for any number of threads, chunks or shapes.

torch splits a sum over its threads and picks an order by the shape, so that its last bits depend on both. Sums over
whole tensors are in fp64, so that nothing overflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lewis.lazy import torch

BLOCK = 2048
_CHUNK = 512 * BLOCK  # elements in fp64 at a time


def add_up(values: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, one after another: fp32 (experts, *shape) -> fp32 (*shape)."""
    result = values[0].clone()
    for value in values[1:]:
        result += value
    return result


def total(values: torch.Tensor) -> float:
    """The sum of fp32 `values` of any shape: by halves within blocks of BLOCK elements, and exactly over these."""
    flat, sums = _flat(values), []
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        blocks = np.zeros((-(-part.size // BLOCK), BLOCK), np.float64)
        blocks.reshape(-1)[: part.size] = part
        while blocks.shape[1] > 1:
            half = blocks.shape[1] // 2
            blocks = blocks[:, :half] + blocks[:, half:]
        sums.append(blocks)
    return exact_sum(float(block) for part in sums for block in part[:, 0])


def exact_sum(sums: Iterable[float]) -> float:
    """The exact sum, rounded; NaN or infinity where it is none."""
    found = list(sums)
    return math.fsum(found) if all(map(math.isfinite, found)) else sum(found)


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """The dot product of two fp32 tensors of one shape."""
    return float(np.einsum("i,i->", _flat(a), _flat(b), dtype=np.float64))


def norm(values: torch.Tensor) -> float:
    """The Euclidean norm of an fp32 tensor."""
    return math.sqrt(inner(values, values))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine between two fp32 tensors of one shape, in [-1, 1]; 0 if one is all zeros."""
    norms = norm(a) * norm(b)
    return min(max(inner(a, b) / norms, -1.0), 1.0) if norms > 0 else 0.0


def _flat(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().reshape(-1).numpy()
