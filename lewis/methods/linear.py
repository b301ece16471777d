"""Linear: the weighted average of the models."""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import cancel_out, combine_linearly, divided
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import PerExpert, merge_method, per_expert


@merge_method(
    "linear", paper="https://arxiv.org/abs/2203.05482", on="weights", elementwise=True, compiled=Loops(Combine.AVERAGE)
)
def linear(weights: torch.Tensor, *, weight: PerExpert[float] = 1.0, normalize: bool = True) -> torch.Tensor:
    """Average the models (model soups): sum_i w_i W_i, divided by sum_i w_i if `normalize`.

    Args:
        weights: fp32, shape (models, *tensor.shape).
        weight: w_i.
        normalize: divide by the sum of the weights.

    Returns:
        fp32 merged weights, shape tensor.shape.

    Raises:
        ValueError: if `normalize` is asked for and the weights sum to 0.
    """
    w = per_expert(weight, weights)
    merged = combine_linearly(weights, w)
    if not normalize:
        return merged
    if cancel_out(w):
        raise ValueError(
            f"linear: the weights {w} sum to 0, so the average is undefined; change them or set normalize: false"
        )
    return divided(merged, sum(w))
