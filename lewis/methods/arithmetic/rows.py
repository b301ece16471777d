"""How a method merges a large tensor by rows: passes over all rows first, if it needs them, then each piece alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lewis.lazy_torch import torch


@dataclass(frozen=True)
class Piece:
    """A run of rows (the last dimension) of one tensor, or all of them.

    Attributes:
        tensors: task vectors or weights, as the method takes them: fp32, shape (experts, rows, columns).
        base: the base's rows: fp32, shape (rows, columns); None if the method was called without a base.
        scales: for each expert a tensor that broadcasts to (rows, columns), or None; None if no expert has one.
        start: the number of the piece's first element in the flat tensor.
    """

    tensors: torch.Tensor
    base: torch.Tensor | None = None
    scales: Sequence[torch.Tensor | None] | None = None
    start: int = 0


@dataclass(frozen=True)
class Pieces:
    """One tensor's pieces, in order; each iteration reads them again.

    Attributes:
        shape: of the tensor.
        read: called for each iteration; yields the pieces.
    """

    shape: tuple[int, ...]
    read: Callable[[], Iterator[Piece]]

    def __iter__(self) -> Iterator[Piece]:
        return self.read()


Finish = Callable[[Piece], "torch.Tensor"]
"""Merges one piece: fp32, shape (rows, columns)."""

ByRows = Callable[..., Finish | None]
"""Takes `Pieces` and the parameters, makes its passes and returns what merges a piece; None: cannot merge by rows."""


def in_one_piece(
    by_rows: ByRows,
    tensors: torch.Tensor,
    base: torch.Tensor | None = None,
    scales: Sequence[torch.Tensor | None] | None = None,
    **parameters: Any,
) -> torch.Tensor:
    """Merge a whole tensor with a method's `by_rows`, as one piece.

    Args:
        by_rows: the method's.
        tensors: fp32, shape (experts, *tensor.shape).
        base: fp32, shape tensor.shape; or None.
        scales: for each expert a tensor that broadcasts to tensor.shape, or None.
        parameters: of the method.

    Returns:
        fp32, shape tensor.shape.
    """
    shape = tuple(tensors.shape[1:])
    columns = shape[-1] if shape else 1
    flat = [None if scale is None else rows_of(scale, shape, slice(None)) for scale in scales or [None] * len(tensors)]
    piece = Piece(tensors.reshape(len(tensors), -1, columns), None if base is None else base.reshape(-1, columns), flat)
    finish = by_rows(Pieces(shape, lambda: iter([piece])), **parameters)
    assert finish is not None
    return finish(piece).reshape(shape)


def rows_of(scale: torch.Tensor, shape: Sequence[int], rows: slice) -> torch.Tensor:
    """The part of a scale for some rows.

    Args:
        scale: broadcasts to the tensor.
        shape: of the tensor.
        rows: of the tensor seen as a matrix, whose columns are the last dimension.

    Returns:
        A tensor that broadcasts to (rows, columns).
    """
    if scale.dim() < 2:
        return scale
    width, leading = scale.shape[-1], tuple(shape[:-1])
    places = torch.arange(*rows.indices(torch.Size(leading).numel()), device=scale.device)
    return scale.expand(*leading, width)[torch.unravel_index(places, leading)]
