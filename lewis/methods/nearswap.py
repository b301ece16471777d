"""NearSwap: take the other model's weight where it is near the base's, and less of it the farther it is."""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.loops import NEAREST, Combine, Loops
from lewis.methods.registry import NotNegative, merge_method


@merge_method(
    "nearswap",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    experts=(1, 1),
    elementwise=True,
    compiled=Loops(Combine.NEAR, threshold="t"),
)
def nearswap(task_vectors: torch.Tensor, *, t: NotNegative) -> torch.Tensor:
    """Move each weight of the base towards the other model's by min(1, t / |tau|) of the way, tau their difference.

    Args:
        task_vectors: fp32, shape (1, *tensor.shape).
        t: the distance up to which the other model's weight is taken whole.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    task_vector = task_vectors[0]
    return (t / task_vector.abs().clamp(min=float(NEAREST))).clamp(max=1) * task_vector
