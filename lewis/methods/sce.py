"""SCE: select by variance, calculate the weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lewis.lazy import torch
from lewis.methods.registry import Fraction, merge_method
from lewis.methods.sparsify import largest
from lewis.methods.sums import add_up, count, inner
from lewis.methods.ties import merge_elected


@merge_method("sce", paper="https://arxiv.org/abs/2408.07990")
def sce(task_vectors: torch.Tensor, *, select_topk: Fraction = 1.0, int8_mask: bool = False) -> torch.Tensor:
    """Keep the elements the experts differ most in, weigh experts by their energy, merge those of the elected sign.

    Expert i has weight w_i = |tau_i|^2 / sum_j |tau_j|^2, after the selection. mergekit takes equal weights where the
    mean squares sum to less than 1e-6, which task vectors of fine-tunes mostly do; here only where all are 0.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        select_topk: fraction kept of the elements whose variance over the experts is not 0, largest first. One expert
            has no variance: less than 1 keeps nothing of it.
        int8_mask: accepted for mergekit's sake; the result does not depend on it.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    chosen = None
    if select_topk < 1:
        variance = task_vectors.var(dim=0, correction=0)
        chosen = largest(variance, int(count(variance) * select_topk))

    def kept() -> Iterator[torch.Tensor]:  # one at a time, for memory's sake
        return (vector if chosen is None else torch.where(chosen, vector, 0.0) for vector in task_vectors)

    weight = shares([inner(vector, vector) for vector in kept()])
    weighted = (vector * share for vector, share in zip(kept(), weight, strict=True))
    return merge_elected(weighted, weight, add_up(kept()), normalize=True)


def shares(energies: Sequence[float]) -> list[float]:
    """Each in the sum of all; 0 if that is 0."""
    return [energy / sum(energies) if sum(energies) else 0.0 for energy in energies]
