"""SLERP: from the base to one other model along the great circle."""

from __future__ import annotations

import math

import numpy as np

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import combine_linearly, cosine, gram
from lewis.methods.registry import Fraction, merge_method

_PARALLEL = 0.9995  # |cosine| beyond which the arc is a straight line (mergekit's)


def coefficients(dots: np.ndarray, *, t: float) -> list[float]:
    """Compute the coefficients of the base and the other model in the result, from their dot products."""
    cos = cosine(dots, 0, 1)
    if t in (0, 1) or abs(cos) > _PARALLEL:
        return [1 - t, t]
    return arc(t, cos)


def arc(t: float, cos: float) -> list[float]:
    """Coefficients of two vectors for the point at `t` of the arc between them; `cos` is the cosine of their angle."""
    angle = math.acos(cos)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


@merge_method(
    "slerp",
    paper="https://dl.acm.org/doi/10.1145/325165.325242",
    on="weights",
    experts=(1, 1),
    coefficients=coefficients,
)
def slerp(weights: torch.Tensor, base: torch.Tensor, *, t: Fraction) -> torch.Tensor:
    """Interpolate on the sphere: sin((1-t) a)/sin a * W_base + sin(t a)/sin a * W, a the angle between the two.

    (Anti)parallel tensors are interpolated on the straight line, and a tensor of zeros counts as perpendicular to any.

    Args:
        weights: fp32, shape (1, *tensor.shape): the model that is not the base.
        base: fp32, shape tensor.shape.
        t: 0 gives the base, 1 the other model; most recipes give a gradient over the layers.

    Returns:
        fp32 merged weights, shape tensor.shape.
    """
    other = weights[0]
    if t in (0, 1):  # the model itself, byte by byte: a sum would lose the sign of -0.0
        return other if t else base
    return combine_linearly([base, other], coefficients(gram([base, other]), t=t))
