"""SCE: select by variance, calculate the weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.cuts import cuts
from lewis.methods.arithmetic.rows import Finish, Piece, Pieces, in_one_piece
from lewis.methods.arithmetic.sums import add_up, count, exact_sum, inner
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import Fraction, merge_method
from lewis.methods.ties import merge_elected


def by_rows(pieces: Pieces, *, select_topk: float, int8_mask: bool) -> Finish:
    """Merge a tensor in pieces: one pass finds the cut, the next the energies of the kept elements, the last merges."""
    cut = None
    if select_topk < 1:
        number = sum(count(_variance(piece)) for piece in pieces)
        [cut] = cuts(lambda: ((piece.start, [_variance(piece)]) for piece in pieces), [int(number * select_topk)])

    def kept(piece: Piece) -> Iterator[torch.Tensor]:  # one at a time, to save memory
        chosen = cut.keeps(_variance(piece), piece.start) if cut else None
        return (vector if chosen is None else torch.where(chosen, vector, 0.0) for vector in piece.tensors)

    energies = [[inner(vector, vector) for vector in kept(piece)] for piece in pieces]
    weight = shares([exact_sum(each) for each in zip(*energies, strict=True)])

    def finish(piece: Piece) -> torch.Tensor:
        weighted = (vector * share for vector, share in zip(kept(piece), weight, strict=True))
        return merge_elected(weighted, weight, add_up(kept(piece)), normalize=True)

    return finish


def shares(energies: Sequence[float]) -> list[float]:
    """Each energy divided by the sum of all; 0 if that sum is 0."""
    return [energy / sum(energies) if sum(energies) else 0.0 for energy in energies]


@merge_method(
    "sce",
    paper="https://arxiv.org/abs/2408.07990",
    by_rows=by_rows,
    compiled=Loops(Combine.VOTE, most_varied="select_topk", weights_by_energy=shares),
)
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
    return in_one_piece(by_rows, task_vectors, select_topk=select_topk, int8_mask=int8_mask)


def _variance(piece: Piece) -> torch.Tensor:
    """The variance over the experts; in fp64, then rounded, so that the order of the experts makes no difference."""
    mean = add_up(vector.double() for vector in piece.tensors) / len(piece.tensors)
    squares = ((vector - mean).square() for vector in piece.tensors)
    return (add_up(squares) / len(piece.tensors)).float()
