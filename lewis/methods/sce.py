"""SCE: select by variance, calculate the weights, erase minority signs."""

from __future__ import annotations

from lewis.lazy import torch
from lewis.methods.registry import Fraction, column, merge_method
from lewis.methods.sparsify import largest
from lewis.methods.sums import inner


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
    if select_topk < 1:
        variance = task_vectors.var(dim=0, correction=0)
        k = int(int(torch.count_nonzero(variance)) * select_topk)
        task_vectors = torch.where(largest(variance, k), task_vectors, 0.0)
    energies = [inner(vector, vector) for vector in task_vectors]
    if sum(energies) == 0:
        return torch.zeros_like(task_vectors[0])
    weight = column([energy / sum(energies) for energy in energies], task_vectors)
    elected = torch.where(task_vectors.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = torch.where(task_vectors.sign() == elected, weight, 0.0)
    divisor = agreeing.sum(dim=0)
    return (task_vectors * agreeing).sum(dim=0) / torch.where(divisor == 0, 1.0, divisor)
