"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sparsify import stack_kept, trim
from lewis.methods.arithmetic.sums import add_up, least_divisor
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import PerExpert, Scales, merge_method, per_expert, scale_of


@merge_method("ties", paper="https://arxiv.org/abs/2306.01708", compiled=Loops(Combine.ELECT))
def ties(
    task_vectors: torch.Tensor,
    scales: Scales = None,
    *,
    density: PerExpert[float] = 1.0,
    weight: PerExpert[float] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Trim each task vector, elect a sign per element, average the agreeing ones.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        scales: of each expert, as in `sparsify.size`.
        density: fraction of each task vector that is kept, largest size first.
        weight: w_i. With one expert and `normalize` it cancels, as in mergekit.
        normalize: divide by the sum of the agreeing weights, per element, unless it is 0.
        rescale: bring each trimmed task vector back to its L1 norm.
        lambda_: scale of the merged delta.
        int8_mask: accepted for mergekit's sake; the result does not depend on it.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    kept = trim_all(task_vectors, scales, density, rescale=rescale)
    return elect_and_merge(kept, weight, normalize=normalize, lambda_=lambda_)


def trim_all(
    task_vectors: torch.Tensor,
    scales: Scales,
    density: PerExpert[float],
    outliers: PerExpert[float] = 0.0,
    *,
    rescale: bool = False,
) -> torch.Tensor:
    """Trim each task vector as `sparsify.trim`, and bring it back to its L1 norm if `rescale`; fp32, same shape."""
    each = zip(task_vectors, per_expert(density, task_vectors), per_expert(outliers, task_vectors), strict=True)
    kept = (trim(vector, rho, scale_of(scales, i), gamma) for i, (vector, rho, gamma) in enumerate(each))
    return stack_kept(kept, task_vectors, rescale=rescale)


def elect_and_merge(kept: torch.Tensor, weight: PerExpert[float], *, normalize: bool, lambda_: float) -> torch.Tensor:
    """Elect the sign of the weighted sum per element (0 counts as +) and merge those that have it (TIES, section 3)."""
    weights = per_expert(weight, kept)

    def weighted() -> Iterator[torch.Tensor]:  # one at a time, to save memory
        return (each * own for each, own in zip(kept, weights, strict=True))

    return merge_elected(weighted(), weights, add_up(weighted()), normalize=normalize) * lambda_


def merge_elected(
    weighted: Iterable[torch.Tensor], weight: list[float], votes: torch.Tensor, *, normalize: bool
) -> torch.Tensor:
    """Per element, add the terms with the sign of the votes (0 counts as +); `normalize` divides by their weights.

    It does not divide where these weights cancel out.
    """
    plus, merged, divisor = votes >= 0, torch.zeros_like(votes), torch.zeros_like(votes)
    for term, its_weight in zip(weighted, weight, strict=True):
        agrees = torch.where(plus, term > 0, term < 0)
        merged += torch.where(agrees, term, 0.0)
        divisor += torch.where(agrees, its_weight, 0.0)
    cancels = divisor.abs() <= float(least_divisor(weight))
    return merged / torch.where(cancels, 1.0, divisor) if normalize else merged
