"""PCB: let parameters compete, inside their task vector and with the other ones."""

from __future__ import annotations

from lewis.lazy import torch
from lewis.methods.registry import PerExpert, Scales, merge_method, per_expert, scale_of
from lewis.methods.sparsify import largest, size
from lewis.methods.sums import add_up


@merge_method("pcb", paper="https://arxiv.org/abs/2410.02396")
def pcb(
    task_vectors: torch.Tensor, scales: Scales = None, *, density: PerExpert[float] = 1.0, lambda_: float = 1.0
) -> torch.Tensor:
    """Average the task vectors, each element by the score beta of how it fares in the competition.

    beta_i = exp(N * s_i^2) * tanh(tau_i * sum_j tau_j), with s_i = |tau_i| (times the scale, if there is one) brought
    to [0, 1] over the tensor and N the number of experts: high for an element that is large in its own task vector and
    goes the way of the others. The int(density * n) elements of the highest score are kept; result: lambda *
    sum_i b_i tau_i / sum_i b_i, with b_i the kept positive beta_i over their maximum.

    The authors' code works on the flattened model and clips its 0.01 % largest and smallest elements; here each
    tensor is on its own and nothing is clipped (the largest of three elements would be). It also shifts the kept
    scores to begin at 0, which loses the last one kept.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        scales: of each expert, as in `sparsify.size`.
        density: fraction of each task vector that is kept, highest score first.
        lambda_: scale of the merged delta.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    together = add_up(task_vectors)
    scores = []
    for i, (task_vector, rho) in enumerate(zip(task_vectors, per_expert(density, task_vectors), strict=True)):
        own = size(task_vector, scale_of(scales, i))
        low, high = own.min(), own.max()
        own = (own - low) / torch.where(high > low, high - low, 1.0)
        beta = torch.exp(len(task_vectors) * own.square()) * _tanh(task_vector, together)
        kept = torch.where(largest(beta, int(rho * beta.numel())), beta, 0.0).clamp(min=0)
        top = kept.max()
        share = (kept / torch.where(top > 0, top, 1.0)).float().clamp(min=torch.finfo(torch.float32).tiny)
        scores.append(torch.where(kept > 0, share, 0.0))  # what is kept has a say, however small
    b = torch.stack(scores)
    divisor = add_up(b)
    return add_up(task_vectors * (b / torch.where(divisor == 0, 1.0, divisor))) * lambda_


def _tanh(task_vector: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """In fp64: the product of two small deltas underflows in fp32."""
    return torch.tanh(task_vector.double() * together)
