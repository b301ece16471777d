"""The inputs of the compiled loops, as memory addresses: one tensor of several models, and its elements' scales."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lewis.merging.engine import kernels
from lewis.merging.engine.selection import Varied, address_of
from lewis.merging.memory_budget import chunks
from lewis.methods.arithmetic.sums import exact_sum
from lewis.models.model import Model

if TYPE_CHECKING:
    import torch


class Inputs:
    """One tensor of several models, given by addresses; keeps the models' files mapped into memory.

    Attributes:
        known: whether the kernels can read every dtype.
        size: number of elements.
        addresses: of each model's bits; uint64, shape (models,).
        kinds: the kernels' number of each dtype, -1 if they have none; int64, shape (models,).
    """

    def __init__(self, models: Sequence[Model], name: str) -> None:
        raw = [model.raw(name) for model in models]
        self.known = all(dtype in kernels.KINDS for dtype, _ in raw)
        self._arrays = [bits if bits.ctypes.data % bits.itemsize == 0 else bits.copy() for _, bits in raw]
        self.size = self._arrays[0].size
        self.addresses = np.array([bits.ctypes.data for bits in self._arrays], np.uint64)
        self.kinds = np.array([kernels.KINDS.get(dtype, -1) for dtype, _ in raw], np.int64)

    def gram(self, *, relative: bool) -> np.ndarray:
        """The dot products (`sums.gram`) of these tensors or, with `relative`, of their differences to the first."""
        count, first = len(self.addresses), int(relative)
        pairs = np.array(list(itertools.combinations_with_replacement(range(first, count), 2)), np.int64)
        found = np.zeros((count - first, count - first))
        for (i, j), dot in zip(pairs - first, self._dots(pairs, relative=relative), strict=True):
            found[i, j] = found[j, i] = dot
        return found

    def energies(self, chosen: Varied | None) -> list[float]:
        """The squared L2 norm of each model's difference to the first one, of the chosen elements or of all."""
        return self._dots(np.array([(i, i) for i in range(1, len(self.addresses))], np.int64), chosen, relative=True)

    def _dots(self, pairs: np.ndarray, chosen: Varied | None = None, *, relative: bool) -> list[float]:
        blocks = np.empty((-(-self.size // kernels.BLOCK), len(pairs)))
        for start, stop in chunks(self.size):
            mask = chosen.kept(start, stop) if chosen else None
            part = blocks[start // kernels.BLOCK : -(-stop // kernels.BLOCK)]
            kernels.dots(self.addresses, self.kinds, self.size, relative, pairs, address_of(mask), start, part)
        return [exact_sum(column.tolist()) for column in blocks.T]

    def owned(self, threshold: float) -> list[tuple[int, int]]:
        """For each model after the first: how many elements differ from the first's by more than `threshold`.

        Returns:
            For each of them, that number, and how many of these elements differ in no other model.
        """
        counts = np.empty((len(self.addresses) - 1, 2), np.int64)
        kernels.owned(self.addresses, self.kinds, self.size, np.float32(threshold), counts)
        return [(int(moved), int(alone)) for moved, alone in counts]


class ScaleLayouts:
    """Factors of the elements of one tensor, laid out as `kernels._times` reads them; keeps them in memory.

    Attributes:
        addresses: of each layout, 0 for no factors; uint64, shape (scales,).
        known: whether every scale can be laid out in this way: it must broadcast along the last dimensions before the
            columns, or along none.
    """

    def __init__(self, scales: Sequence[torch.Tensor | None], shape: tuple[int, ...]) -> None:
        """Write each scale in the order in which the compiled loops read it.

        Args:
            scales: fp32, each broadcasts to the tensor; None for no factors.
            shape: of the tensor.
        """
        self._arrays, self.known = list[np.ndarray](), True
        self.addresses = np.zeros(len(scales), np.uint64)
        for i, scale in enumerate(scales):
            if scale is not None:
                *rows, width = (1,) * (len(shape) - scale.dim()) + tuple(scale.shape)
                while rows and rows[-1] == 1:
                    rows.pop()
                self.known &= tuple(rows) == shape[: len(rows)]
                height = math.prod(shape[len(rows) : -1]) if rows else 0
                factors = np.ascontiguousarray(scale.numpy(), np.float32)
                layout = np.array([factors.ctypes.data, height, width], np.int64)
                self._arrays += factors, layout
                self.addresses[i] = layout.ctypes.data
