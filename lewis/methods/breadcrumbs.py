"""Model Breadcrumbs: leave out the largest elements as well as the smallest."""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import Fraction, PerExpert, Scales, merge_method
from lewis.methods.task_arithmetic import combine
from lewis.methods.ties import elect_and_merge, trim_all

PAPER = "https://arxiv.org/abs/2312.06795"


@merge_method("breadcrumbs", paper=PAPER, compiled=Loops(Combine.SUM, outliers="gamma"))
def breadcrumbs(
    task_vectors: torch.Tensor,
    scales: Scales = None,
    *,
    density: PerExpert[float] = 1.0,
    gamma: PerExpert[Fraction] = 0.01,
    weight: PerExpert[float] = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Trim both ends of each task vector, then task arithmetic.

    Exactly int(density * n) elements are kept, whatever gamma is. Earlier versions of mergekit kept none of a tensor
    of fewer than 1 / gamma elements, and none at all at gamma 0.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        scales: of each expert, as in `sparsify.size`.
        density: fraction of each task vector that is kept; 1 keeps all of it.
        gamma: fraction of the largest sizes that is dropped first; less where the density would not be reached.
        weight: w_i.
        normalize: divide by the sum of the weights (unless it is 0).
        rescale: bring each trimmed task vector back to its L1 norm.
        lambda_: scale of the merged delta.
        int8_mask: accepted for mergekit's sake; the result does not depend on it.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    kept = trim_all(task_vectors, scales, density, gamma, rescale=rescale)
    return combine(kept, weight, normalize=normalize, lambda_=lambda_)


@merge_method("breadcrumbs_ties", paper=PAPER, compiled=Loops(Combine.ELECT, outliers="gamma"))
def breadcrumbs_ties(
    task_vectors: torch.Tensor,
    scales: Scales = None,
    *,
    density: PerExpert[float] = 1.0,
    gamma: PerExpert[Fraction] = 0.01,
    weight: PerExpert[float] = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> torch.Tensor:
    """Trim both ends, then elect signs and merge as TIES does. Arguments and result: as `breadcrumbs`."""
    kept = trim_all(task_vectors, scales, density, gamma, rescale=rescale)
    return elect_and_merge(kept, weight, normalize=normalize, lambda_=lambda_)
