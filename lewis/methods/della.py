"""DELLA: drop at random, the small elements of a row more often than the large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sparsify import drop_by_rank, stack_kept
from lewis.methods.arithmetic.streams import Stream
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import NotNegative, PerExpert, Scales, merge_method, per_expert, scale_of
from lewis.methods.task_arithmetic import combine
from lewis.methods.ties import elect_and_merge

PAPER = "https://arxiv.org/abs/2406.11617"


def probabilities_fit(values: Mapping[str, Any], experts: int) -> str | None:
    """Check that the probabilities lie in (0, 1); densities 0 and 1 use no probabilities."""
    density, epsilon = values["density"], values["epsilon"]
    if density in (0, 1) or (density - epsilon > 0 and density + epsilon < 1):
        return None
    return (
        f"expected 0 < density - epsilon and density + epsilon < 1 (they are probabilities), got density={density:g}, "
        f"epsilon={epsilon:g}; set epsilon below {min(density, 1 - density):g}, or change the density"
    )


@merge_method("della", paper=PAPER, check=probabilities_fit, compiled=Loops(Combine.ELECT, rank_width="epsilon"))
def della(
    task_vectors: torch.Tensor,
    streams: Sequence[Stream],
    scales: Scales = None,
    *,
    density: PerExpert[float] = 1.0,
    epsilon: PerExpert[NotNegative] = 0.15,
    weight: PerExpert[float] = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Drop by rank of magnitude, then elect signs and merge as TIES does.

    mergekit ranks along the second dimension, which for a tensor of three is not the row; here it is always the last.
    A row of one element, whose rank mergekit divides by 0, is kept with probability `density`. An epsilon that does
    not fit the density is refused before the merge, not in the middle of it.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        streams: one random stream per expert.
        scales: of each expert, as in `sparsify.size`.
        density: mean probability that an element is kept.
        epsilon: probabilities rise from density - epsilon (smallest of a row) to density + epsilon (largest).
        weight: w_i.
        normalize: divide by the sum of the agreeing weights, per element.
        rescale: bring each task vector back to its L1 norm (mergekit's rule; the paper divides by the probabilities).
        lambda_: scale of the merged delta.
        int8_mask: accepted for mergekit's sake; the result does not depend on it.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.

    Raises:
        ValueError: if density and epsilon do not fit together.
    """
    kept = _drop_all(task_vectors, streams, scales, density, epsilon, rescale)
    return elect_and_merge(kept, weight, normalize=normalize, lambda_=lambda_)


@merge_method("della_linear", paper=PAPER, check=probabilities_fit, compiled=Loops(Combine.SUM, rank_width="epsilon"))
def della_linear(
    task_vectors: torch.Tensor,
    streams: Sequence[Stream],
    scales: Scales = None,
    *,
    density: PerExpert[float] = 1.0,
    epsilon: PerExpert[NotNegative] = 0.15,
    weight: PerExpert[float] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Drop by rank of magnitude, then task arithmetic.

    Arguments and result: as `della`, but `normalize` divides by the sum of all weights (unless it is 0).
    """
    kept = _drop_all(task_vectors, streams, scales, density, epsilon, rescale)
    return combine(kept, weight, normalize=normalize, lambda_=lambda_)


def _drop_all(
    task_vectors: torch.Tensor,
    streams: Sequence[Stream],
    scales: Scales,
    density: PerExpert[float],
    epsilon: PerExpert[float],
    rescale: bool,
) -> torch.Tensor:
    densities, epsilons = per_expert(density, task_vectors), per_expert(epsilon, task_vectors)
    for rho, width in zip(densities, epsilons, strict=True):
        if problem := probabilities_fit({"density": rho, "epsilon": width}, len(task_vectors)):
            raise ValueError(problem)
    each = enumerate(zip(task_vectors, densities, epsilons, streams, strict=True))
    kept = (drop_by_rank(*own, scale_of(scales, i)) for i, own in each)
    return stack_kept(kept, task_vectors, rescale=rescale)
