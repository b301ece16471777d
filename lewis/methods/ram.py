"""RAM: average the elements that several experts changed, and take those that only one changed whole."""

from __future__ import annotations

from collections.abc import Iterable

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import add_up, count
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import NotNegative, column, merge_method

PAPER = "https://arxiv.org/abs/2601.13572"


@merge_method("ram", paper=PAPER, elementwise=True, compiled=Loops(Combine.SHARE, threshold="epsilon"))
def ram(task_vectors: torch.Tensor, *, epsilon: NotNegative = 1e-5) -> torch.Tensor:
    """Average each element over the experts that changed it.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        epsilon: a change up to this size counts as none, and is left out.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    changed = task_vectors.abs() > epsilon
    return add_up(torch.where(changed, task_vectors, 0.0)) / changed.sum(dim=0).clamp(min=1)


def weights(counts: Iterable[tuple[int, int]], *, r: float, alpha: float, epsilon: float) -> list[float]:
    """Compute the factor of each expert's own changes, those of elements that no other expert changed.

    Args:
        counts: for each expert, how many elements it moved by more than `epsilon`, and how many of these it alone did.
        r, alpha, epsilon: as in `ramplus_tl`.
    """
    return [1 + r * min(alpha, (moved - alone) / max(alone, 1)) for moved, alone in counts]


@merge_method("ramplus_tl", paper=PAPER, compiled=Loops(Combine.SHARE, threshold="epsilon", weights_by_owners=weights))
def ramplus_tl(
    task_vectors: torch.Tensor, *, r: float = 0.1, alpha: NotNegative = 0.2, epsilon: NotNegative = 1e-5
) -> torch.Tensor:
    """RAM; what one expert alone changed is scaled by 1 + r * min(alpha, shared / alone), per expert and tensor.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        r: strength of the scaling.
        alpha: upper bound of the ratio of elements that others changed too to elements that this expert alone changed.
        epsilon: a change up to this size counts as none, and is left out.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    changed = task_vectors.abs() > epsilon
    owners = changed.sum(dim=0)
    scales = weights(((count(own), count(own & (owners == 1))) for own in changed), r=r, alpha=alpha, epsilon=epsilon)
    kept = torch.where(changed, task_vectors, 0.0)
    return add_up(torch.where(owners == 1, kept * column(scales, kept), kept)) / owners.clamp(min=1)
