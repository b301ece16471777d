"""Sums of x^T x over the inputs x of a layer, of which only one half is computed and kept, since they are symmetric.

The rows of the matrix are cut into parts. Each part has a slab: its rows, from the columns of the diagonal block on.
One flat tensor holds all slabs, one after another. The cuts depend on the size only, and each slab is computed by
itself: so the sums have the same bits for any number of threads.
"""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.regression import COLUMNS
from lewis.methods.arithmetic.sums import slices


def packed_length(size: int) -> int:
    """Elements of the flat tensor for a matrix of this many rows and columns."""
    return sum((cut.stop - cut.start) * (size - cut.start) for cut in slices(size, COLUMNS))


def slabs(packed: torch.Tensor, size: int) -> list[tuple[slice, torch.Tensor]]:
    """Return for each slab of a flat tensor the slice of its rows, and a view (rows, columns from the slice on)."""
    found, start = [], 0
    for cut in slices(size, COLUMNS):
        rows, columns = cut.stop - cut.start, size - cut.start
        found.append((cut, packed[start : start + rows * columns].view(rows, columns)))
        start += rows * columns
    return found


def unpacked(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Expand a flat tensor of slabs to the whole symmetric matrix, (size, size)."""
    matrix = torch.empty(size, size, dtype=packed.dtype)
    for cut, slab in slabs(packed, size):
        matrix[cut, cut.start :] = slab
        matrix[cut.start :, cut] = slab.T
    return matrix


def diagonal(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The diagonal, (size,), of the matrix that a flat tensor of slabs holds."""
    return torch.cat([slab.diagonal() for _, slab in slabs(packed, size)])
