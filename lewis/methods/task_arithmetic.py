"""Task arithmetic: the weighted sum of the task vectors."""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import combine_linearly, divided
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import PerExpert, merge_method, per_expert


@merge_method(
    "task_arithmetic", paper="https://arxiv.org/abs/2212.04089", elementwise=True, compiled=Loops(Combine.SUM)
)
def task_arithmetic(
    task_vectors: torch.Tensor,
    *,
    weight: PerExpert[float] = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Add the task vectors: lambda * sum_i w_i tau_i, divided by sum_i w_i if `normalize`.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        weight: w_i.
        normalize: divide by the sum of the weights (unless it is 0).
        lambda_: scale of the merged delta.
        int8_mask: accepted for mergekit's sake; the result does not depend on it.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    return combine(task_vectors, weight, normalize=normalize, lambda_=lambda_)


def combine(task_vectors: torch.Tensor, weight: PerExpert[float], *, normalize: bool, lambda_: float) -> torch.Tensor:
    """Compute the weighted sum of task vectors as `task_arithmetic` defines it; other methods share this."""
    weights = per_expert(weight, task_vectors)
    total = sum(weights)
    merged = combine_linearly(task_vectors, weights)
    if normalize and abs(total) >= 1e-8:
        merged = divided(merged, total)
    return merged * lambda_
