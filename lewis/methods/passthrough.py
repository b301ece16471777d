"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import PerExpert, merge_method, per_expert


@merge_method(
    "passthrough",
    paper="https://github.com/arcee-ai/mergekit#passthrough",
    on="weights",
    experts=(1, 1),
    elementwise=True,
    compiled=Loops(Combine.AVERAGE, weight="scale"),
)
def passthrough(weights: torch.Tensor, *, scale: PerExpert[float] = 1.0) -> torch.Tensor:
    """Copy the model, times `scale`.

    Args:
        weights: fp32, shape (1, *tensor.shape).
        scale: factor; usually given by a filter, to weaken one kind of tensor.

    Returns:
        fp32 weights, shape tensor.shape.
    """
    return weights[0] * per_expert(scale, weights)[0]
