"""SLERP: from the base to one other model along the great circle."""

import math

import torch

from lewis.methods.registry import Fraction, merge_method
from lewis.methods.sums import cosine

PARALLEL = 0.9995  # |cosine| beyond which the arc is a straight line (mergekit's)


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
    of_base, of_other = arc(cosine(base, weights[0]), t)
    return of_base * base + of_other * weights[0]


def arc(cosine: float, t: float) -> tuple[float, float]:
    """The factors of the two ends at `t` of the arc whose ends have this cosine."""
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
