"""Karcher: the Riemannian mean of the models on the sphere."""

from __future__ import annotations

import math

from lewis.lazy import torch
from lewis.methods.registry import Count, NotNegative, column, merge_method
from lewis.methods.sums import inner, norm


@merge_method("karcher", paper="https://arxiv.org/abs/2603.04972", on="weights")
def karcher(weights: torch.Tensor, *, max_iter: Count = 10, tol: NotNegative = 1e-5) -> torch.Tensor:
    """Find the direction with the least squared angles to all models, and give it their mean length.

    From the mean of the unit tensors u_i, step along the mean of log_m(u_i) = a_i / sin(a_i) * (u_i - cos(a_i) m),
    a_i the angle between m and u_i, until that step is shorter than `tol`. The models have equal say; a base_model
    counts as one of them. Angles are taken from the distances |u_i - m|: mergekit's fp32 arc cosine reads less than
    3e-4, which is where fine-tunes lie, as 0, and leaves those models out. A model opposite to m does not pull:
    mergekit divides by the rounding error of sin(pi).

    Args:
        weights: fp32, shape (models, *tensor.shape).
        max_iter: steps at most.
        tol: length of the last step, and the norm under which a tensor counts as 0 and has no direction.

    Returns:
        fp32 merged weights, shape tensor.shape.
    """
    if len(weights) == 1:
        return weights[0]
    lengths = [norm(w) for w in weights]
    units = [w / length for w, length in zip(weights, lengths, strict=True) if length > tol]
    if not units:
        return torch.zeros_like(weights[0])
    mean = _unit(torch.stack(units).mean(dim=0), tol)
    mean = units[0] if mean is None else mean
    for _ in range(max_iter):
        angles = [2 * math.asin(min(norm(unit - mean) / 2, 1.0)) for unit in units]
        factors = [_log_factor(angle) / len(units) for angle in angles]
        step = (torch.stack(units) * column(factors, weights)).sum(dim=0)
        step = step - mean * inner(step, mean)
        if (angle := norm(step)) < tol:
            break
        moved = math.cos(angle) * mean + (math.sin(angle) / angle) * step
        mean = _unit(moved, tol)
        mean = moved if mean is None else mean
    return mean * (sum(lengths) / len(lengths))


def _unit(tensor: torch.Tensor, tol: float) -> torch.Tensor | None:
    length = norm(tensor)
    return None if length < tol or length == 0 else tensor / length


def _log_factor(angle: float) -> float:
    """a / sin(a); 0 for opposite tensors, as no direction leads from one to the other."""
    if angle < 1e-6:
        return 1.0
    return angle / math.sin(angle) if math.pi - angle > 1e-3 else 0.0
