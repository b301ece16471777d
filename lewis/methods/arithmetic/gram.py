"""Sums of x^T x over the inputs x of a layer, of which only one half is computed and kept, since they are symmetric.

The matrix is cut into parts of columns. Of each part there is a slab: these columns, from the diagonal block on, as
rows. One flat tensor holds all slabs, one after another. The cuts depend on the size only, and each slab is computed
by itself: so the sums have the same bits for any number of threads.
"""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.jobs import slices
from lewis.methods.arithmetic.regression import COLUMNS


def packed_length(size: int) -> int:
    """Elements of the flat tensor for a matrix of this many rows and columns."""
    return sum((cut.stop - cut.start) * (size - cut.start) for cut in slices(size, COLUMNS))


def slabs(packed: torch.Tensor, size: int) -> list[tuple[slice, torch.Tensor]]:
    """(columns, the view of these rows and of the columns from the first on) of each slab of a flat tensor."""
    found, start = [], 0
    for cut in slices(size, COLUMNS):
        rows, columns = cut.stop - cut.start, size - cut.start
        found.append((cut, packed[start : start + rows * columns].view(rows, columns)))
        start += rows * columns
    return found


def unpacked(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The whole symmetric matrix, (size, size), of a flat tensor."""
    matrix = torch.empty(size, size, dtype=packed.dtype)
    for cut, slab in slabs(packed, size):
        matrix[cut, cut.start :] = slab
        matrix[cut.start :, cut] = slab.T
    return matrix


def diagonal(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The diagonal, (size,), of a flat tensor."""
    return torch.cat([slab.diagonal() for _, slab in slabs(packed, size)])
