"""Multi-SLERP: the weighted mean of directions, at the weighted mean of lengths."""

from __future__ import annotations

import math

import numpy as np

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import cancel_out, combine_linearly, exact_sum, gram
from lewis.methods.registry import NotNegative, PerExpert, merge_method, per_expert

_NOISE = 1e-7  # directions cancel if their sum is at most this share of what was added up


def coefficients(dots: np.ndarray, *, weight: PerExpert[float], normalize_weights: bool, eps: float) -> list[float]:
    """Compute the coefficient of each tensor in the result, from the tensors' dot products.

    Raises:
        ValueError: as `multislerp`.
    """
    if len(dots) == 1:
        return [1.0]
    w = per_expert(weight, dots)
    if normalize_weights:
        if cancel_out(w):
            raise ValueError(f"multislerp: the weights {w} sum to 0; change them or set normalize_weights: false")
        w = [each / sum(w) for each in w]
    lengths = np.sqrt(dots.diagonal()).tolist()
    if not any(lengths):
        return [0.0] * len(w)
    factors = np.array([each / (length + eps) if length else 0.0 for each, length in zip(w, lengths, strict=True)])
    products = factors[:, None] * factors * dots
    length = math.sqrt(max(exact_sum(products.flat), 0.0))
    if length <= max(eps, _NOISE * math.sqrt(exact_sum(abs(products).flat))):
        if len(w) == 2:
            return w
        raise ValueError("multislerp: the weighted directions cancel out, so their mean has none; change the weights")
    mean_length = sum(each * own for each, own in zip(w, lengths, strict=True))
    return (factors * (mean_length / length)).tolist()


@merge_method(
    "multislerp",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    on="either",
    coefficients=coefficients,
)
def multislerp(
    tensors: torch.Tensor, *, weight: PerExpert[float] = 1.0, normalize_weights: bool = True, eps: NotNegative = 1e-8
) -> torch.Tensor:
    """Interpolate any number of tensors on the sphere: m / |m| * sum_i w_i |x_i|, with m = sum_i w_i x_i / |x_i|.

    mergekit projects the directions to the tangent space at m / |m|, sums them there and maps back. But sum_i w_i u_i
    is |m| times that point, so the sum in the tangent space is always 0, and only the formula above is left.
    Two tensors whose directions cancel are added up with their weights. Where every tensor is 0 (a layer that was
    frozen in all experts) the result is 0; mergekit stops there with an error from three experts on.

    Args:
        tensors: fp32 task vectors (with a base) or weights, shape (experts, *tensor.shape).
        weight: w_i.
        normalize_weights: divide the weights by their sum first.
        eps: added to the lengths that are divided by; a shorter |m| counts as 0, that is, the directions cancel.

    Returns:
        fp32, shape tensor.shape: a delta to add to the base, or the merged weights.

    Raises:
        ValueError: if the weights sum to 0, or three or more directions cancel.
    """
    found = coefficients(gram(tensors), weight=weight, normalize_weights=normalize_weights, eps=eps)
    return combine_linearly(tensors, found)
