"""Sums over whole tensors: in fp64, so that nothing overflows, and the same for any number of threads.

torch splits a sum over its threads, so that its last bits depend on how many there are; numpy's does not.
"""

import math

import numpy as np
import torch


def total(values: torch.Tensor) -> float:
    """The sum of fp32 `values` of any shape."""
    return float(np.add.reduce(_flat(values), dtype=np.float64))


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
