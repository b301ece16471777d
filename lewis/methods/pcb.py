"""PCB: score elements by how they compare within their own task vector and with the other task vectors."""

from __future__ import annotations

from collections.abc import Iterator

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.cuts import cuts
from lewis.methods.arithmetic.rows import Finish, Piece, Pieces, in_one_piece
from lewis.methods.arithmetic.sparsify import size
from lewis.methods.arithmetic.sums import add_up
from lewis.methods.registry import PerExpert, Scales, merge_method, per_expert, scale_of


def by_rows(pieces: Pieces, *, density: PerExpert[float], lambda_: float) -> Finish:
    """Merge a tensor in pieces.

    One pass finds each expert's smallest and largest |tau|, a few more its largest score and which scores are kept.
    """
    elements, spans, tops, shares = 0, list[tuple[torch.Tensor, torch.Tensor]](), list[torch.Tensor](), list[float]()
    for piece in pieces:
        own = [_size(piece, i).aminmax() for i in range(len(piece.tensors))]
        spans = spans or [(each.min, each.max) for each in own]
        spans = [
            (torch.minimum(low, each.min), torch.maximum(high, each.max))
            for (low, high), each in zip(spans, own, strict=True)
        ]
        elements, shares = elements + piece.tensors[0].numel(), per_expert(density, piece.tensors)

    def scored() -> Iterator[tuple[int, list[torch.Tensor]]]:
        nonlocal tops
        for piece in pieces:
            scores = _scores(piece, spans)
            largest = [own.max() for own in scores]
            tops = [torch.maximum(a, b) for a, b in zip(tops or largest, largest, strict=True)]
            yield piece.start, scores

    found = cuts(scored, [int(share * elements) for share in shares])

    def finish(piece: Piece) -> torch.Tensor:
        b = torch.zeros_like(piece.tensors)
        for i, scores in enumerate(_scores(piece, spans) if tops else []):
            share = scores / torch.where(tops[i] > 0, tops[i], 1.0)
            share = share.float().clamp(min=torch.finfo(torch.float32).tiny)  # kept elements always count
            b[i] = torch.where((scores > 0) & found[i].keeps(scores, piece.start), share, 0.0)
        divisor = add_up(b)
        return add_up(piece.tensors * (b / torch.where(divisor == 0, 1.0, divisor))) * lambda_

    return finish


@merge_method("pcb", paper="https://arxiv.org/abs/2410.02396", by_rows=by_rows, in_mergekit=False)
def pcb(
    task_vectors: torch.Tensor, scales: Scales = None, *, density: PerExpert[float] = 1.0, lambda_: float = 1.0
) -> torch.Tensor:
    """Average the task vectors, each element weighted by its score beta.

    beta_i = exp(N * s_i^2) * tanh(tau_i * sum_j tau_j), with s_i = |tau_i| (times the scale, if there is one) brought
    to [0, 1] over the tensor and N the number of experts: high for an element that is large in its own task vector and
    has the sign of the sum. The int(density * n) elements of the highest score are kept; result: lambda *
    sum_i b_i tau_i / sum_i b_i, with b_i the kept positive beta_i over their maximum.

    The authors' code works on the flattened model and clips its 0.01 % largest and smallest elements. Here each tensor
    is merged by itself, and nothing is clipped (of a tensor of three elements that would be the largest). Their code
    also shifts the kept scores so that the smallest is 0, which drops that element.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        scales: of each expert, as in `sparsify.size`.
        density: fraction of each task vector that is kept, highest score first.
        lambda_: scale of the merged delta.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    return in_one_piece(by_rows, task_vectors, scales=scales, density=density, lambda_=lambda_)


def _size(piece: Piece, expert: int) -> torch.Tensor:
    return size(piece.tensors[expert], scale_of(piece.scales, expert))


def _scores(piece: Piece, spans: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """beta of each expert, or 0 where it is negative; fp64."""
    together, scores = add_up(piece.tensors), []
    for i, (low, high) in enumerate(spans):
        own = (_size(piece, i) - low) / torch.where(high > low, high - low, 1.0)
        # In fp64: the product of two small deltas underflows in fp32.
        agreement = torch.tanh(piece.tensors[i].double() * together)
        scores.append((torch.exp(len(spans) * own.square()) * agreement).clamp(min=0))
    return scores
