"""SLERP: from the base to one other model along the great circle."""

from __future__ import annotations

import math

from lewis.lazy import torch
from lewis.methods.registry import Fraction, merge_method
from lewis.methods.sums import cosine

_PARALLEL = 0.9995  # |cosine| beyond which the arc is a straight line (mergekit's)


@merge_method("slerp", paper="https://dl.acm.org/doi/10.1145/325165.325242", on="weights", experts=(1, 1))
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
    if t in (0, 1):  # byte by byte, where a sum would lose the sign of -0.0
        return other if t else base
    cos = cosine(base, other)
    if abs(cos) > _PARALLEL:
        return torch.lerp(base, other, t)
    angle = math.acos(cos)
    of_base, of_other = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return of_base * base + of_other * other
