"""Arcee Fusion: keep the most important changes, above a threshold that follows from the tensor's own quartiles."""

from __future__ import annotations

from collections.abc import Iterator

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.cuts import keys, kth_largest, number_of
from lewis.methods.arithmetic.rows import Finish, Piece, Pieces, in_one_piece
from lewis.methods.registry import merge_method

_EPSILON = 1e-8  # added to probabilities before their logarithm is taken
_BLOCK = 2**15 - 1  # elements of a block of rows: it fits the cache, and torch does not split it over threads


def by_rows(pieces: Pieces) -> Finish:
    """Merge a tensor in pieces: one pass finds each row's divergence, the next the quartiles of the importance."""
    information = torch.cat([divergence(piece.tensors[0], _base(piece)) for piece in pieces])
    columns = (pieces.shape or (1,))[-1]
    elements = len(information) * columns

    def of_rows(piece: Piece) -> torch.Tensor:
        first = piece.start // columns
        return information[first : first + piece.tensors.shape[1]]

    def scored() -> Iterator[list[torch.Tensor]]:
        return ([keys(_scores(piece.tensors[0], of_rows(piece)))] * 3 for piece in pieces)

    ranks = [elements - int(share * (elements - 1)) for share in (0.25, 0.5, 0.75)]  # quartiles, ranks rounded down
    first, median, third = (number_of(each.key) for each in kth_largest(scored, ranks))

    def finish(piece: Piece) -> torch.Tensor:
        delta = piece.tensors[0]
        return torch.where(_scores(delta, of_rows(piece)) >= median + 1.5 * (third - first), delta, 0.0)

    return finish


@merge_method("arcee_fusion", paper="https://arcee.ai", experts=(1, 1), by_rows=by_rows)
def arcee_fusion(task_vectors: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Keep the elements of the task vector with importance >= median + 1.5 * (third - first quartile).

    The importance of an element is |delta| times the Kullback-Leibler divergence of its row, softmax(W) against
    softmax(W_base). It is computed in fp64: for the small deltas of a fine-tune mergekit's fp32 divergence is mostly
    rounding. Quartiles are exact: of a tensor of over a million elements mergekit draws a million without a seed, so
    each of its runs differs.

    Args:
        task_vectors: fp32, shape (1, *tensor.shape).
        base: fp32, shape tensor.shape.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    return in_one_piece(by_rows, task_vectors, base)


def _base(piece: Piece) -> torch.Tensor:
    assert piece.base is not None
    return piece.base


def _scores(task_vector: torch.Tensor, information: torch.Tensor) -> torch.Tensor:
    """The importance of each element: |delta| times the divergence of its row; fp64, shape tensor.shape."""
    scores = torch.empty(task_vector.shape, dtype=torch.float64, device=task_vector.device)
    for part, row, out in _blocks(task_vector, information, scores):
        torch.mul(part.abs(), row, out=out)
    return scores


def divergence(task_vector: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(softmax(W) || softmax(W_base)) of each row (the last dimension).

    Returns:
        fp64, shape (*tensor.shape[:-1], 1); of a single number, shape (1,).
    """
    found = base.new_empty((*base.shape[:-1], 1), dtype=torch.float64)
    for delta, old, out in _blocks(task_vector, base, found):
        p, q = (_softmax(x.double()).add_(_EPSILON) for x in (old + delta, old))
        torch.sum((p / q).log_().mul_(p), dim=-1, keepdim=True, out=out)
    return found


def _softmax(values: torch.Tensor) -> torch.Tensor:
    """The softmax of each row, in place; torch's own function splits a block over threads."""
    values.sub_(values.amax(dim=-1, keepdim=True)).exp_()
    return values.div_(values.sum(dim=-1, keepdim=True))


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield blocks of the same rows of each tensor, as 2-d views. Tensors after the first may have one column."""
    width = tensors[0].shape[-1] if tensors[0].dim() else 1
    rows = max(1, _BLOCK // max(width, 1))
    height = tensors[0].numel() // max(width, 1)
    return zip(*(tensor.reshape(height, -1).split(rows) for tensor in tensors), strict=True)
