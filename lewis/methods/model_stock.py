"""Model Stock: how far to go from the base to the mean of the models, from the angle between them."""

from __future__ import annotations

import itertools

import numpy as np

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.rows import Finish, Piece, Pieces, in_one_piece
from lewis.methods.arithmetic.sums import add_up, combine_linearly, cosine, gram
from lewis.methods.registry import merge_method


def coefficients(dots: np.ndarray, *, filter_wise: bool) -> list[float] | None:
    """Compute the task vectors' coefficients from their dot products; None if each row has its own angle."""
    if filter_wise:
        return None
    pairs = list(itertools.combinations(range(len(dots)), 2))
    c = sum(cosine(dots, i, j) for i, j in pairs) / len(pairs)
    divisor = 1 + (len(dots) - 1) * c
    return [0.0 if abs(divisor) < 1e-6 else c / divisor] * len(dots)


def by_rows(pieces: Pieces, *, filter_wise: bool) -> Finish | None:
    """Return the function that merges row by row; None without `filter_wise`: a tensor then has one angle."""
    return _finish if filter_wise else None


@merge_method(
    "model_stock",
    paper="https://arxiv.org/abs/2403.19522",
    experts=(2, None),
    coefficients=coefficients,
    by_rows=by_rows,
)
def model_stock(task_vectors: torch.Tensor, *, filter_wise: bool = False) -> torch.Tensor:
    """Scale the mean task vector by t = N c / (1 + (N - 1) c), c the mean cosine between the N task vectors.

    Where 1 + (N - 1) c is 0 (task vectors that cancel out), t is 0. mergekit divides the dot products by at least
    1e-6, so that the task vectors of small tensors count as perpendicular. Here the cosine does not depend on the
    scale, and is 0 only if a task vector is 0.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        filter_wise: one angle for each row (the last dimension) instead of one for the tensor.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    if not filter_wise or task_vectors.dim() == 2:
        found = coefficients(gram(task_vectors), filter_wise=False)
        assert found is not None
        return combine_linearly(task_vectors, found)
    return in_one_piece(by_rows, task_vectors, filter_wise=filter_wise)


def _finish(piece: Piece) -> torch.Tensor:
    count = len(piece.tensors)
    lengths = [torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in piece.tensors]
    units = [v / torch.where(length == 0, 1.0, length) for v, length in zip(piece.tensors, lengths, strict=True)]
    cosines = [(a * b).sum(dim=-1, keepdim=True).clamp(-1, 1) for a, b in itertools.combinations(units, 2)]
    c = add_up(cosines) / len(cosines)
    divisor = 1 + (count - 1) * c
    return torch.where(divisor.abs() < 1e-6, 0.0, c / divisor) * add_up(piece.tensors)
