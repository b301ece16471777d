"""Karcher: the Riemannian mean of the models on the sphere."""

from __future__ import annotations

import math

import numpy as np

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import combine_linearly, exact_sum, gram
from lewis.methods.registry import Count, NotNegative, merge_method

_NOISE = 1e-7  # a length below this may be only a rounding error


def coefficients(dots: np.ndarray, *, max_iter: int, tol: float) -> list[float]:
    """Compute the models' coefficients from their dot products; each step of the search combines models linearly."""
    if len(dots) == 1:
        return [1.0]
    lengths = np.sqrt(dots.diagonal())
    used = lengths > tol
    if not used.any():
        return [0.0] * len(dots)
    between = dots[np.ix_(used, used)] / np.outer(lengths[used], lengths[used])  # cosines
    np.fill_diagonal(between, 1)
    units = np.eye(len(between))

    def length(vector: np.ndarray) -> float:
        return math.sqrt(max(_product(vector, between, vector), 0.0))

    def unit(vector: np.ndarray) -> np.ndarray | None:
        size = length(vector)
        return None if size < max(tol, _NOISE) else vector / size

    mean = unit(units.sum(axis=0) / len(units))
    mean = units[0] if mean is None else mean
    for _ in range(max_iter):
        angles = [2 * math.asin(min(length(own - mean) / 2, 1.0)) for own in units]
        step = np.array([_log_factor(angle) / len(units) for angle in angles])
        step = step - mean * _product(step, between, mean)
        if (angle := length(step)) < max(tol, _NOISE):
            break
        moved = math.cos(angle) * mean + (math.sin(angle) / angle) * step
        found = unit(moved)
        mean = moved if found is None else found
    result = np.zeros(len(dots))
    result[used] = mean / lengths[used] * (exact_sum(lengths) / len(lengths))
    return result.tolist()


def _product(a: np.ndarray, between: np.ndarray, b: np.ndarray) -> float:
    """a^T between b, summed exactly, so that it is the same on every machine."""
    return exact_sum((a[:, None] * between * b).flat)


def _log_factor(angle: float) -> float:
    """a / sin(a); 0 for opposite tensors, since no single direction leads from one to the other."""
    if angle < 1e-6:
        return 1.0
    return angle / math.sin(angle) if math.pi - angle > 1e-3 else 0.0


@merge_method("karcher", paper="https://arxiv.org/abs/2603.04972", on="weights", coefficients=coefficients)
def karcher(weights: torch.Tensor, *, max_iter: Count = 10, tol: NotNegative = 1e-5) -> torch.Tensor:
    """Find the direction with the least squared angles to all models, and give it their mean length.

    From the mean of the unit tensors u_i, step along the mean of log_m(u_i) = a_i / sin(a_i) * (u_i - cos(a_i) m),
    a_i the angle between m and u_i, until that step is shorter than `tol`. All models count equally, and a base_model
    is one of them. Angles are computed from the distances |u_i - m|: mergekit's fp32 arc cosine gives 0 for angles
    below 3e-4, where fine-tunes lie, and leaves those models out. A model opposite to m is ignored: mergekit divides by
    the rounding error of sin(pi).

    Args:
        weights: fp32, shape (models, *tensor.shape).
        max_iter: steps at most.
        tol: length of the last step, and the norm under which a tensor counts as 0 and has no direction.

    Returns:
        fp32 merged weights, shape tensor.shape.
    """
    return combine_linearly(weights, coefficients(gram(weights), max_iter=max_iter, tol=tol))
