"""Multi-SLERP: the weighted mean of directions, at the weighted mean of lengths."""

from __future__ import annotations

from lewis.lazy import torch
from lewis.methods.registry import NotNegative, PerExpert, column, merge_method, per_expert
from lewis.methods.sums import norm


@merge_method("multislerp", paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea", on="either")
def multislerp(
    tensors: torch.Tensor,
    *,
    weight: PerExpert[float] = 1.0,
    normalize_weights: bool = True,
    eps: NotNegative = 1e-8,
) -> torch.Tensor:
    """Interpolate any number of tensors on the sphere: m / |m| * sum_i w_i |x_i|, with m = sum_i w_i x_i / |x_i|.

    mergekit projects the directions to the tangent space at m / |m|, sums them there and maps back. The sum in the
    tangent space is always 0, as sum_i w_i u_i is itself |m| times that point: only this formula is left of it.
    Two tensors whose directions cancel are added up with their weights. Where every tensor is 0 (a layer that was
    frozen in all experts) the result is 0; mergekit stops there with an error from three experts on.

    Args:
        tensors: fp32 task vectors (with a base) or weights, shape (experts, *tensor.shape).
        weight: w_i.
        normalize_weights: divide the weights by their sum first.
        eps: added to the lengths that are divided by; a shorter |m| counts as cancelled.

    Returns:
        fp32, shape tensor.shape: a delta to add to the base, or the merged weights.

    Raises:
        ValueError: if the weights sum to 0, or three or more directions cancel.
    """
    if len(tensors) == 1:
        return tensors[0]
    w = per_expert(weight, tensors)
    if normalize_weights:
        if sum(w) == 0:
            raise ValueError(f"multislerp: the weights {w} sum to 0; change them or set normalize_weights: false")
        w = [each / sum(w) for each in w]
    lengths = [norm(x) for x in tensors]
    if not any(lengths):
        return torch.zeros_like(tensors[0])
    factors = [each / (length + eps) if length else 0.0 for each, length in zip(w, lengths, strict=True)]
    mean = (tensors * column(factors, tensors)).sum(dim=0)
    if (length := norm(mean)) <= eps:
        if len(tensors) == 2:
            return (tensors * column(w, tensors)).sum(dim=0)
        raise ValueError("multislerp: the weighted directions cancel out, so their mean has none; change the weights")
    return mean * (sum(each * own for each, own in zip(w, lengths, strict=True)) / length)
