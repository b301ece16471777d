"""The inputs of one layer while they come in: their products are summed up, or rows are kept where these suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lewis.lazy_torch import torch
from lewis.methods.arithmetic import gram, regression
from lewis.methods.arithmetic.regression import keeps_rows


class Collected:
    """The inputs of one layer. `regression.keeps_rows` decides what is left of them.

    Attributes:
        tokens: how many have come in.
        size: number of inputs.
    """

    def __init__(self, size: int, expected: int) -> None:
        """
        Args:
            size: number of inputs.
            expected: tokens that can come in at most; of a very wide layer an even share of so many is kept.
        """
        self.tokens, self.size, self._expected = 0, size, expected
        self._rows: list[torch.Tensor] = []
        self._packed: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def add(self, parts: Sequence[torch.Tensor]) -> list[Callable[[], None]]:
        """Take rows, parts of fp32 (tokens, in), which are nobody else's.

        Returns:
            Jobs that add them to the products; they must have been run before the next rows come.
        """
        for part in parts:
            self._take(part)
        if keeps_rows(self.size, self.tokens):
            return []
        if self._packed is None:
            self._packed = torch.zeros(gram.packed_length(self.size), device=self._rows[0].device)
        taken, self._rows = self._rows, []
        return [partial(_multiply, taken, cut, slab) for cut, slab in gram.slabs(self._packed, self.size)]

    def _take(self, rows: torch.Tensor) -> None:
        if self.size > regression.DUAL_ABOVE and self._expected > regression.DUAL_TOKENS:
            squares = rows.square().sum(dim=0, dtype=torch.float64)
            self._squares = squares if self._squares is None else self._squares + squares
            self._rows.append(rows[self._of_even_share(len(rows))])
        else:
            self._rows.append(rows)
        self.tokens += len(rows)

    def _of_even_share(self, count: int) -> torch.Tensor:
        """Which of the next `count` rows are among `DUAL_TOKENS` that are spread evenly over all that are expected."""
        taken = torch.arange(regression.DUAL_TOKENS) * self._expected // regression.DUAL_TOKENS - self.tokens
        return taken[(taken >= 0) & (taken < count)]

    def result(self) -> dict[str, list[torch.Tensor]]:
        """What is kept, on the CPU, fp32; nothing more must come in.

        Returns:
            Parts, one below the other, of `squares`, the mean of x_j^2, (in,); and of `gram`, the mean of x^T x, packed
            as `arithmetic.gram` says, or of `rows`, (tokens, in).
        """
        if self._packed is not None:
            self._packed /= self.tokens
            packed = self._packed.cpu()
            return {"squares": [gram.diagonal(packed, self.size)], "gram": [packed]}
        squares = self._squares
        if squares is None:
            squares = sum((rows.square().sum(dim=0, dtype=torch.float64) for rows in self._rows), torch.zeros(()))
        return {"squares": [(squares / max(self.tokens, 1)).float().cpu()], "rows": [rows.cpu() for rows in self._rows]}


def _multiply(parts: list[torch.Tensor], cut: slice, slab: torch.Tensor) -> None:
    for part in parts:
        slab.addmm_(part[:, cut].T, part[:, cut.start :])
