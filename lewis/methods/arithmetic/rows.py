"""Methods that take a tensor by rows: passes that find out what has to be known of the whole, then each piece alone."""

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
        base: the base's own: fp32, shape (rows, columns); None if the method was called without.
        scales: of each expert, what broadcasts to (rows, columns), or None; None for no expert.
        start: number of the first element in the flat tensor.
    """

    tensors: torch.Tensor
    base: torch.Tensor | None = None
    scales: Sequence[torch.Tensor | None] | None = None
    start: int = 0


@dataclass(frozen=True)
class Pieces:
    """One tensor's pieces, in order, as often as they are asked for.

    Attributes:
        shape: of the tensor.
        read: reads them.
    """

    shape: tuple[int, ...]
    read: Callable[[], Iterator[Piece]]

    def __iter__(self) -> Iterator[Piece]:
        return self.read()


Finish = Callable[[Piece], "torch.Tensor"]
"""Merges one piece: fp32, shape (rows, columns)."""

ByRows = Callable[..., Finish | None]
"""Takes `Pieces` and the parameters; gives None if, with these, the method has no way by rows."""


def in_one_piece(
    by_rows: ByRows,
    tensors: torch.Tensor,
    base: torch.Tensor | None = None,
    scales: Sequence[torch.Tensor | None] | None = None,
    **parameters: Any,
) -> torch.Tensor:
    """Merge a whole tensor by a method's way by rows.

    Args:
        by_rows: the way.
        tensors: fp32, shape (experts, *tensor.shape).
        base, scales: as in `Piece`, of the tensor's shape, and broadcasting to it.

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
    """These rows of what broadcasts to a tensor of this shape, such that it broadcasts to (rows, columns)."""
    if scale.dim() < 2:
        return scale
    width, leading = scale.shape[-1], tuple(shape[:-1])
    places = torch.arange(*rows.indices(torch.Size(leading).numel()), device=scale.device)
    return scale.expand(*leading, width)[torch.unravel_index(places, leading)]
