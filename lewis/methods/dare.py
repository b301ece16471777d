"""DARE: drop elements at random and rescale, before adding (linear) or electing signs (ties)."""

from __future__ import annotations

from collections.abc import Sequence

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sparsify import drop, stack_kept
from lewis.methods.arithmetic.streams import Stream
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import PerExpert, merge_method, per_expert
from lewis.methods.task_arithmetic import combine
from lewis.methods.ties import elect_and_merge

PAPER = "https://arxiv.org/abs/2311.03099"


@merge_method("dare_linear", paper=PAPER, compiled=Loops(Combine.SUM))
def dare_linear(
    task_vectors: torch.Tensor,
    streams: Sequence[Stream],
    *,
    density: PerExpert[float] = 1.0,
    weight: PerExpert[float] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Drop at random, then task arithmetic.

    mergekit uses no seed unless it is given one, and then draws in the order of the models. Here each expert's tensor
    has its own random stream, so a recipe gives the same bytes in any order of its models.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        streams: one random stream per expert.
        density: probability that an element is kept.
        weight: w_i.
        normalize: divide by the sum of the weights (unless it is 0).
        rescale: bring each task vector back to its L1 norm (mergekit's rule; the paper divides by the density).
        lambda_: scale of the merged delta.
        int8_mask: accepted for mergekit's sake; the result does not depend on it.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    kept = _drop_all(task_vectors, streams, density, rescale)
    return combine(kept, weight, normalize=normalize, lambda_=lambda_)


@merge_method("dare_ties", paper=PAPER, compiled=Loops(Combine.ELECT))
def dare_ties(
    task_vectors: torch.Tensor,
    streams: Sequence[Stream],
    *,
    density: PerExpert[float] = 1.0,
    weight: PerExpert[float] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Drop at random, then elect signs and merge as TIES does. Arguments and result: as `dare_linear`."""
    kept = _drop_all(task_vectors, streams, density, rescale)
    return elect_and_merge(kept, weight, normalize=normalize, lambda_=lambda_)


def _drop_all(
    task_vectors: torch.Tensor, streams: Sequence[Stream], density: PerExpert[float], rescale: bool
) -> torch.Tensor:
    each = zip(task_vectors, per_expert(density, task_vectors), streams, strict=True)
    return stack_kept((drop(*own) for own in each), task_vectors, rescale=rescale)
