"""Sums in a fixed order, and how they are cut into jobs: the same bits for any threads, chunks, shapes or devices.

torch splits a sum over its threads and chooses the order by the shape, so the last bits of its sums depend on both.
Sums over whole tensors are in fp64, so that they do not overflow. Jobs are cut by the sizes only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from lewis.lazy_torch import torch

BLOCK = 2048
_CHUNK = 512 * BLOCK  # elements that are converted to fp64 at a time
T = TypeVar("T")


class Jobs(Protocol):
    """Runs jobs, each single-threaded, at the same time or one after another; returns their results in order."""

    def __call__(self, jobs: Sequence[Callable[[], T]], /) -> list[T]: ...


def one_after_another(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run jobs one after another, in this thread: `Jobs` without threads."""
    return [job() for job in jobs]


def slices(length: int, step: int) -> list[slice]:
    """Cut a length into an even number of parts of nearly equal length, at most `step`."""
    count = min(2 * -(-length // (2 * step)), length)
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def add_up(values: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """Add along the first dimension, in order: fp32 (experts, *shape) -> fp32 (*shape)."""
    each = iter(values)
    result = next(each).clone()
    for value in each:
        result += value
    return result


def combine_linearly(tensors: Sequence[torch.Tensor] | torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """sum_i c_i x_i of fp32 tensors of one shape, added in order; c_i is rounded to fp32 first."""
    result = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        result += tensor * coefficient
    return result


def count(mask: torch.Tensor) -> int:
    """How many elements are not 0."""
    return int(torch.count_nonzero(mask))


def divided(tensor: torch.Tensor, number: float) -> torch.Tensor:
    """Divide an fp32 tensor by a number, made a tensor: torch on a GPU would multiply by a plain number's inverse."""
    return tensor / torch.tensor(number, dtype=torch.float32, device=tensor.device)


def total(values: torch.Tensor) -> float:
    """The sum of fp32 `values` of any shape: `_by_halves` in blocks of BLOCK elements, exact over the blocks."""
    return exact_sum(block for part in values.detach().reshape(-1).split(_CHUNK) for block in _by_halves(part.double()))


def _by_halves(values: torch.Tensor) -> list[float]:
    """The sum of each block of flat fp64 `values`: add the second half to the first until one number is left."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
    blocks = padded.reshape(-1, BLOCK)
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        blocks = blocks[:, :half] + blocks[:, half:]
    sums: list[float] = blocks[:, 0].tolist()
    return sums


def exact_sum(sums: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN or infinity if a number is not finite."""
    found = list(sums)
    return math.fsum(found) if all(map(math.isfinite, found)) else sum(found)


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """The dot product of two fp32 tensors of one shape, added as in `total`; each product is exact in fp64."""
    parts = zip(*(x.detach().reshape(-1).split(_CHUNK) for x in (a, b)), strict=True)
    return exact_sum(block for x, y in parts for block in _by_halves(x.double() * y.double()))


def gram(tensors: Sequence[torch.Tensor] | torch.Tensor) -> np.ndarray:
    """The dot products of all pairs of n fp32 tensors of one shape: fp64, shape (n, n), symmetric to the bit."""
    dots = np.zeros((len(tensors), len(tensors)))
    for i, j in itertools.combinations_with_replacement(range(len(tensors)), 2):
        dots[i, j] = dots[j, i] = inner(tensors[i], tensors[j])
    return dots


def cancel_out(weights: Sequence[float]) -> bool:
    """Whether weights sum to 0, up to rounding errors: 0.1 + 0.2 - 0.3 is not exactly 0."""
    return abs(sum(weights)) <= 1e-12 * sum(map(abs, weights))


def least_divisor(weights: Sequence[float]) -> np.float32:
    """How far from 0 the fp32 sum of some of these weights may be though they cancel out: 0.3 + 0.6 - 0.9 is 6e-8.

    It is 0 if no two of them have opposite signs.
    """
    w = np.array(weights, np.float32)
    opposed = w.min() < 0 < w.max()
    return np.float32(len(w) * 2.0**-24 * np.abs(w.astype(np.float64)).sum() if opposed else 0.0)


def cosine(dots: np.ndarray, i: int, j: int) -> float:
    """The cosine between tensors i and j of a `gram`, in [-1, 1]; 0 if one of them is all zeros."""
    norms = math.sqrt(dots[i, i]) * math.sqrt(dots[j, j])
    return min(max(float(dots[i, j]) / norms, -1.0), 1.0) if norms > 0 else 0.0
