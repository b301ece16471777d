"""NuSLERP: SLERP of two models, or of their task vectors, by weights, as a whole or row by row."""

from __future__ import annotations

import numpy as np

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.rows import Finish, Piece, Pieces, in_one_piece
from lewis.methods.arithmetic.sums import combine_linearly, cosine, gram
from lewis.methods.registry import PerExpert, merge_method, per_expert
from lewis.methods.slerp import arc

_TINY = 1e-7  # smaller norms count as this (mergekit's value)
_FLAT = 2e-6  # 1 - cos^2 below which fp32 cannot tell two directions from one line


def coefficients(
    dots: np.ndarray, *, weight: PerExpert[float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> list[float] | None:
    """Compute the two tensors' coefficients from their dot products; None if a tensor is not taken as one vector."""
    if not nuslerp_flatten:
        return None
    t, cos = _share(per_expert(weight, dots)), cosine(dots, 0, 1)
    if 1 - cos * cos <= _FLAT:
        return [1 - t, t]
    return arc(t, cos)


def _share(weights: list[float]) -> float:
    first, second = weights
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def by_rows(
    pieces: Pieces, *, weight: PerExpert[float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> Finish | None:
    """Merge vector by vector: each row by itself, or whole columns, whose dot products take a pass of their own."""
    if nuslerp_flatten or (nuslerp_row_wise and len(pieces.shape) > 2):
        return None
    of_columns = sum((_dots(piece.tensors, -2) for piece in pieces), torch.zeros(())) if nuslerp_row_wise else None

    def finish(piece: Piece) -> torch.Tensor:
        dots = _dots(piece.tensors, -1) if of_columns is None else of_columns.to(piece.tensors.device)
        return _between(piece.tensors, dots, _share(per_expert(weight, piece.tensors)))

    return finish


@merge_method(
    "nuslerp",
    paper="https://dl.acm.org/doi/10.1145/325165.325242",
    on="either",
    experts=(2, 2),
    coefficients=coefficients,
    by_rows=by_rows,
)
def nuslerp(
    tensors: torch.Tensor,
    *,
    weight: PerExpert[float] = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> torch.Tensor:
    """Interpolate two tensors on the sphere, at t = w_2 / (w_1 + w_2); t = 1/2 if the weights cancel.

    With a base, task vectors are interpolated; without, the weights themselves. Directions on one line are
    interpolated on it. mergekit takes only 1 - cos^2 <= 1e-16 for one line, which fp32 rounding may miss; then
    antiparallel rows are multiplied by 1/sin, which is some thousands.

    Args:
        tensors: fp32 task vectors or weights, shape (2, *tensor.shape).
        weight: w_i.
        nuslerp_flatten: take the tensor as one vector; otherwise interpolate vector by vector.
        nuslerp_row_wise: of the vectors, take those along the first dimension instead of the last (mergekit's naming).

    Returns:
        fp32, shape tensor.shape: a delta to add to the base, or the merged weights.
    """
    if nuslerp_flatten or tensors.dim() <= 2:
        found = coefficients(gram(tensors), weight=weight, nuslerp_flatten=True, nuslerp_row_wise=nuslerp_row_wise)
        assert found is not None
        return combine_linearly(tensors, found)
    if nuslerp_row_wise:
        return _between(tensors, _dots(tensors, 1), _share(per_expert(weight, tensors)))
    return in_one_piece(
        by_rows, tensors, weight=weight, nuslerp_flatten=nuslerp_flatten, nuslerp_row_wise=nuslerp_row_wise
    )


def _dots(tensors: torch.Tensor, dim: int) -> torch.Tensor:
    """x.x, x.y and y.y of the vectors along one dimension of (2, *shape), in fp64: (3, *shape), that one being 1."""
    x, y = tensors.double()
    return torch.stack([(a * b).sum(dim=dim % tensors.dim() - 1, keepdim=True) for a, b in ((x, x), (x, y), (y, y))])


def _between(tensors: torch.Tensor, dots: torch.Tensor, t: float) -> torch.Tensor:
    lengths = dots[0].sqrt().clamp(min=_TINY) * dots[2].sqrt().clamp(min=_TINY)
    cos = (dots[1] / lengths).clamp(-1, 1)
    straight = 1 - cos.square() <= _FLAT
    angle = torch.acos(torch.where(straight, 0.0, cos))
    of_first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle)).float()
    of_second = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle)).float()
    return of_first * tensors[0] + of_second * tensors[1]
