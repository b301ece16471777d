"""Sums in one order, the same for any number of threads, chunks, shapes or devices.

torch splits a sum over its threads and picks an order by the shape, so that its last bits depend on both. Sums over
whole tensors are in fp64, so that nothing overflows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from lewis.lazy_torch import torch

BLOCK = 2048
_CHUNK = 512 * BLOCK  # elements in fp64 at a time


def add_up(values: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum over the first dimension, one after another: fp32 (experts, *shape) -> fp32 (*shape)."""
    each = iter(values)
    result = next(each).clone()
    for value in each:
        result += value
    return result


def combine_linearly(tensors: Sequence[torch.Tensor] | torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """sum_i c_i x_i of fp32 tensors of one shape, one after another; c_i is rounded to fp32 first."""
    result = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        result += tensor * coefficient
    return result


def count(mask: torch.Tensor) -> int:
    """How many elements are not 0."""
    return int(torch.count_nonzero(mask))


def divided(tensor: torch.Tensor, number: float) -> torch.Tensor:
    """An fp32 tensor through a number: by a number that is no tensor, torch multiplies with its inverse on a GPU."""
    return tensor / torch.tensor(number, dtype=torch.float32, device=tensor.device)


def total(values: torch.Tensor) -> float:
    """The sum of fp32 `values` of any shape: by halves within blocks of BLOCK elements, and exactly over these."""
    return exact_sum(block for part in values.detach().reshape(-1).split(_CHUNK) for block in _by_halves(part.double()))


def _by_halves(values: torch.Tensor) -> list[float]:
    """The sum of each block of flat fp64 `values`."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
    blocks = padded.reshape(-1, BLOCK)
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        blocks = blocks[:, :half] + blocks[:, half:]
    sums: list[float] = blocks[:, 0].tolist()
    return sums


def exact_sum(sums: Iterable[float]) -> float:
    """The exact sum, rounded; NaN or infinity where it is none."""
    found = list(sums)
    return math.fsum(found) if all(map(math.isfinite, found)) else sum(found)


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """The dot product of two fp32 tensors of one shape, in the order of `total`; a product of two is exact in fp64."""
    parts = zip(*(x.detach().reshape(-1).split(_CHUNK) for x in (a, b)), strict=True)
    return exact_sum(block for x, y in parts for block in _by_halves(x.double() * y.double()))


def gram(tensors: Sequence[torch.Tensor] | torch.Tensor) -> np.ndarray:
    """The dot products of all pairs of n fp32 tensors of one shape: fp64, shape (n, n), symmetric to the bit."""
    dots = np.zeros((len(tensors), len(tensors)))
    for i, j in itertools.combinations_with_replacement(range(len(tensors)), 2):
        dots[i, j] = dots[j, i] = inner(tensors[i], tensors[j])
    return dots


def cosine(dots: np.ndarray, i: int, j: int) -> float:
    """The cosine between two tensors by the `gram` of them and others, in [-1, 1]; 0 if one is all zeros."""
    norms = math.sqrt(dots[i, i]) * math.sqrt(dots[j, j])
    return min(max(float(dots[i, j]) / norms, -1.0), 1.0) if norms > 0 else 0.0
