"""The part of a layer's regression in which each input stands alone, as if the inputs were uncorrelated.

RegMean's factor alpha mixes the regression with this part: see `regression`, whose symbols are used here.
"""

from __future__ import annotations

from collections.abc import Sequence

from lewis.lazy_torch import torch


class Uncorrelated:
    """The part of a layer's regression that takes inputs as uncorrelated, with its share 1 - alpha, and the ridge.

    Attributes:
        pull: the diagonal of D = (1 - alpha) diag(S) + r I, fp64 (in,); r is 0 until `add_ridge`.
    """

    def __init__(self, merged: Sequence[torch.Tensor], shifts: Sequence[torch.Tensor | None], alpha: float) -> None:
        """Sum up the squares of the inputs, and the products with their shifts.

        Args:
            merged, shifts: of each expert X_t and Z_t - X_t (None: 0) with rows scaled by sqrt(c_t), fp32 (tokens, in).
            alpha: factor of the off-diagonals, below 1.
        """
        self._share = 1 - alpha
        self._squares = [x.double().square().sum(dim=0) for x in merged]
        self._shifts = [
            torch.zeros(x.shape[1]).double() if shift is None else (shift * x).sum(dim=0).double()
            for x, shift in zip(merged, shifts, strict=True)
        ]
        self.pull = self._share * torch.stack(self._squares).sum(dim=0)

    def diagonal(self, count: int) -> torch.Tensor:
        """The diagonal of S over the first `count` experts, fp64 (in,)."""
        return torch.stack(self._squares[:count]).sum(dim=0)

    def add_ridge(self, ridge: float) -> None:
        """Add r to D."""
        self.pull = self.pull + max(ridge, torch.finfo(torch.float32).tiny)

    def solution(self, anchor: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Q = (1 - alpha) sum_t c_t [ (W_t - W_a) diag(X_t^T X_t) + W_t diag((Z_t - X_t)^T X_t) ] D^-1.

        Args:
            anchor: W_a, or some of its rows, fp32 (out, in).
            weights: W_t of each expert, the same rows.

        Returns:
            fp32 (out, in).
        """
        found = torch.zeros(anchor.shape, dtype=torch.float64)
        for weight, square, shift in zip(weights, self._squares, self._shifts, strict=True):
            found += (weight - anchor) * square + weight * shift
        return (found * (self._share / self.pull)).float()


def shift_of_each(merged: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> torch.Tensor:
    """The diagonal of (Z_t - X_t)^T X_t, fp32 (in,), of parts whose rows together are the tokens."""
    parts = [((z - x) * x).sum(dim=0) for x, z in zip(merged, own, strict=True)]
    return torch.stack(parts).sum(dim=0)
