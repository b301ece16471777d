"""Ridge regression of one linear layer: the closed form behind RegMean and its forward-order form.

Let W_a be an anchor (for instance the base and the sum of the task vectors), W_t the weight of expert t, X_t the inputs
of the layer in the merged model and Z_t its inputs in expert t, one row per calibration token of expert t. The fit is

    W = argmin  sum_t c_t || X_t W^T - Z_t W_t^T - B_t ||_F^2 + r || W - W_a ||_F^2  =  W_a + R (S + r I)^-1
    S = sum_t c_t X_t^T X_t                                                          (in, in)
    R = sum_t c_t [ (W_t - W_a) X_t^T X_t + W_t (Z_t - X_t)^T X_t + B_t^T X_t ]        (out, in)

B_t, one row per token, is what the layer shall give besides: what the merged model's residual stream lacks there, or
the difference of the biases. It may be 0.

With Z_t = X_t, the inputs in the experts, this is RegMean (arXiv 2212.09849, equation 3) with a ridge towards an
anchor; with the inputs of the model merged so far it is its form in forward order (FeatCal, arXiv 2605.13030). R is
written with differences, so that nothing is lost to rounding where the merged model is close to the experts.

With Z_t = X_t and B_t = 0, all that is needed of X_t is the mean of the products of its columns, X_t^T X_t / tokens: it
can be measured once and kept (`Gram`).

Where there are fewer tokens than inputs, the same solution follows from the tokens' own products (the dual form): with
X the rows of all X_t, each scaled by sqrt(c_t), and E those of X_t (W_t - W_a)^T + (Z_t - X_t) W_t^T, scaled alike,

    W = W_a + E^T (X X^T + r I)^-1 X         (E with the rows of B_t added)

Every sum is cut into jobs in a way that depends on the shapes only, and each job runs single-threaded: so the result
has the same bits for any number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lewis.lazy_torch import torch

COLUMNS = 256  # of a product that one job computes
ROWS = 384  # output rows that one job solves for
DUAL_ABOVE = 8192  # inputs: beyond as many, the products of all pairs of inputs are not worth their memory
DUAL_TOKENS = 4096  # that the dual form keeps of such a layer, spread evenly


def keeps_rows(size: int, tokens: int) -> bool:
    """Whether the inputs themselves are worth less room and time than the products of all pairs of them.

    So it is with fewer tokens than half of the inputs, since the products are symmetric. A layer with more than
    `DUAL_ABOVE` inputs always keeps rows, at most `DUAL_TOKENS` of them.

    Args:
        size: number of inputs of the layer.
        tokens: rows of inputs.
    """
    return size > DUAL_ABOVE or tokens < size // 2


Jobs = Callable[[Sequence[Callable[[], None]]], None]
"""Runs jobs, each single-threaded, in any order, at the same time or one after another."""


def one_after_another(jobs: Sequence[Callable[[], None]]) -> None:
    """`Jobs` without threads."""
    for job in jobs:
        job()


Besides = Sequence["torch.Tensor"] | None
"""B_t of one expert: fp32 parts beside those of its rows, each (tokens, out); None: 0."""


@dataclass
class Rows:
    """The tokens of one expert at one layer.

    Attributes:
        merged: X_t, fp32: parts whose rows together are the tokens, each (tokens, in).
        own: Z_t, alike; the same objects as `merged` where there is no difference.
        weight: c_t times the number of tokens; c_t itself is `weight / tokens`.
    """

    merged: list[torch.Tensor]
    own: list[torch.Tensor]
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Number of inputs of the layer."""
        return self.merged[0].shape[1]

    @property
    def tokens(self) -> int:
        """How many rows."""
        return sum(len(part) for part in self.merged)

    @property
    def share(self) -> float:
        """c_t."""
        return self.weight / max(self.tokens, 1)

    @property
    def shifted(self) -> bool:
        """Whether the inputs of the expert are others than those of the merged model."""
        return any(own is not merged for own, merged in zip(self.own, self.merged, strict=True))


@dataclass
class Gram:
    """What was measured of the tokens of one expert at one layer, for a fit with Z_t = X_t and B_t = 0.

    Attributes:
        mean: X_t^T X_t / tokens, fp32 (in, in).
        tokens: how many.
        weight: c_t times the number of tokens.
    """

    mean: torch.Tensor
    tokens: int
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Number of inputs of the layer."""
        return len(self.mean)

    @property
    def share(self) -> float:
        """What `mean` counts in S: c_t times the number of tokens."""
        return self.weight

    @property
    def shifted(self) -> bool:
        """Never: the inputs are those of the expert."""
        return False


@dataclass
class Inputs:
    """The inputs of layers that share them (q, k and v): what is computed of them is computed once.

    Attributes:
        experts: the tokens of each expert, or what was measured of them.
        ridge: r in units of the mean diagonal of S.
        jobs: runs what is computed.
    """

    experts: Sequence[Rows | Gram]
    ridge: float
    jobs: Jobs = one_after_another
    _grams: list[torch.Tensor] = field(default_factory=list)
    _shifts: list[torch.Tensor | None] | None = None
    _factor: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of inputs of the layer."""
        return self.experts[0].size

    @property
    def is_dual(self) -> bool:
        """Whether the dual form is cheaper, or the other one is too large; it needs the rows of all experts."""
        if any(isinstance(rows, Gram) for rows in self.experts):
            return False
        return keeps_rows(self.size, sum(rows.tokens for rows in self.experts))

    def solve(
        self, anchor: torch.Tensor, weights: Sequence[torch.Tensor], besides: Sequence[Besides] | None = None
    ) -> torch.Tensor:
        """Fit one layer.

        Args:
            anchor: W_a, fp32 (out, in).
            weights: W_t of each expert, fp32 (out, in).
            besides: B_t of each expert, in the parts of its rows.

        Returns:
            W, fp32 (out, in).

        Raises:
            ValueError: if the inputs are not finite.
        """
        if self.size == 0 or all(rows.tokens == 0 for rows in self.experts):
            return anchor.clone()
        besides = besides or [None] * len(self.experts)
        return (self._dual if self.is_dual else self._primal)(anchor, weights, besides)

    # ----- the primal form

    def _primal(
        self, anchor: torch.Tensor, weights: Sequence[torch.Tensor], besides: Sequence[Besides]
    ) -> torch.Tensor:
        if self._factor is None:
            self._factor = _cholesky(self._products(), self.ridge)
        solved, factor = torch.empty_like(anchor), self._factor
        # What the tokens miss is summed over pairs of inputs, for all layers that share them, or token by token.
        by_token = any(more is not None for more in besides) or (self._shifts is None and 2 * len(anchor) <= self.size)
        if not by_token and self._shifts is None:
            self._shifts = [
                self._shift(each) if isinstance(each, Rows) and each.shifted else None for each in self.experts
            ]
        shifts = [None] * len(self.experts) if by_token or self._shifts is None else self._shifts

        def job(part: slice) -> None:
            right = torch.zeros(part.stop - part.start, self.size, dtype=torch.float64)
            for rows, gram, shift, weight, more in zip(
                self.experts, self._grams, shifts, weights, besides, strict=True
            ):
                found = (weight[part] - anchor[part]) @ gram
                if shift is not None:
                    found.addmm_(weight[part], shift)
                elif by_token and isinstance(rows, Rows) and (rows.shifted or more is not None):
                    for i, (merged, own) in enumerate(zip(rows.merged, rows.own, strict=True)):
                        missed = (own - merged) @ weight[part].T
                        found.addmm_((missed if more is None else missed.add_(more[i][:, part])).T, merged)
                right.add_(found, alpha=rows.share)
            moved = torch.cholesky_solve(right.T.contiguous(), factor).T
            solved[part] = (anchor[part].double() + moved).float()

        self.jobs([_bound(job, part) for part in slices(len(anchor), ROWS)])
        return solved

    def _products(self) -> torch.Tensor:
        """Set the X_t^T X_t, of which only the blocks on and above the diagonal are computed; gives S, fp64."""
        total = torch.empty(self.size, self.size, dtype=torch.float64)
        self._grams = [
            rows.mean if isinstance(rows, Gram) else torch.empty(self.size, self.size) for rows in self.experts
        ]

        def job(columns: slice) -> None:
            summed = torch.zeros(columns.stop - columns.start, self.size - columns.start, dtype=torch.float64)
            for rows, gram in zip(self.experts, self._grams, strict=True):
                if isinstance(rows, Rows):
                    block = torch.zeros(summed.shape)
                    for part in rows.merged:
                        block.addmm_(part[:, columns].T, part[:, columns.start :])
                    gram[columns, columns.start :] = block
                    gram[columns.start :, columns] = block.T
                summed.add_(gram[columns, columns.start :], alpha=rows.share)
            total[columns, columns.start :] = summed
            total[columns.start :, columns] = summed.T

        self.jobs([_bound(job, columns) for columns in slices(self.size, COLUMNS)])
        return total

    def _shift(self, rows: Rows) -> torch.Tensor:
        """(Z_t - X_t)^T X_t."""
        shift = torch.empty(self.size, self.size)

        def job(columns: slice) -> None:
            block = torch.zeros(columns.stop - columns.start, self.size)
            for own, merged in zip(rows.own, rows.merged, strict=True):
                block.addmm_((own[:, columns] - merged[:, columns]).T, merged)
            shift[columns] = block

        self.jobs([_bound(job, columns) for columns in slices(self.size, COLUMNS)])
        return shift

    # ----- the dual form

    def _dual(self, anchor: torch.Tensor, weights: Sequence[torch.Tensor], besides: Sequence[Besides]) -> torch.Tensor:
        known = [rows for rows in self.experts if isinstance(rows, Rows)]
        sampled = [self._sampled(rows, more) for rows, more in zip(known, besides, strict=True)]
        merged, own = (torch.cat([each[i] for each in sampled]) for i in range(2))  # type: ignore[misc]
        counts = [len(each[0]) for each in sampled]
        if self._factor is None:
            kernel = torch.empty(len(merged), len(merged), dtype=torch.float64)

            def multiply(columns: slice) -> None:
                kernel[columns] = (merged[columns] @ merged.T).double()

            self.jobs([_bound(multiply, columns) for columns in slices(len(merged), COLUMNS)])
            mean = float(kernel.diagonal().sum()) / self.size
            self._factor = _cholesky(kernel, self.ridge, mean)
        solved, factor = torch.empty_like(anchor), self._factor

        def job(part: slice) -> None:
            missed = [
                x @ (weight[part] - anchor[part]).T + (z - x) @ weight[part].T + (0 if more is None else more[:, part])
                for x, z, weight, (_, _, more) in zip(
                    merged.split(counts), own.split(counts), weights, sampled, strict=True
                )
            ]
            found = torch.cholesky_solve(torch.cat(missed).double(), factor)
            solved[part] = anchor[part] + found.T.float() @ merged

        self.jobs([_bound(job, part) for part in slices(len(anchor), ROWS)])
        return solved

    def _sampled(self, rows: Rows, more: Besides) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """X_t, Z_t and B_t with their rows scaled by sqrt(c_t); of a large layer, an even share of the rows."""
        given = torch.cat(list(more)) if more else None
        parts: list[torch.Tensor | None] = [torch.cat(rows.merged), torch.cat(rows.own), given]
        total, count = sum(each.tokens for each in self.experts), rows.tokens
        if self.size > DUAL_ABOVE and total > DUAL_TOKENS:
            wanted = max(1, DUAL_TOKENS * count // total)
            taken = torch.arange(wanted) * count // wanted
            parts, count = [None if part is None else part[taken] for part in parts], wanted
        scale = (rows.weight / max(count, 1)) ** 0.5
        merged, own, scaled = (None if part is None else part * scale for part in parts)
        assert merged is not None and own is not None
        return merged, own, scaled


def _cholesky(matrix: torch.Tensor, ridge: float, mean: float | None = None) -> torch.Tensor:
    """The lower factor of a symmetric matrix, fp64, with `ridge` times its mean diagonal (or `mean`) on the diagonal.

    A ridge that is too small for the rounding errors of a singular matrix is raised tenfold until it holds.

    Raises:
        ValueError: if the matrix is not finite.
    """
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean()) if mean is None else mean
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("activations into it are NaN, Inf or too large for fp32")
    added, before = max(ridge * mean, torch.finfo(torch.float32).tiny), 0.0
    while True:
        diagonal += added - before
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        before, added = added, 10 * max(added, 1e-9 * mean)


def slices(length: int, step: int) -> list[slice]:
    """Parts of nearly equal length, at most `step`, an even number of them."""
    count = min(2 * -(-length // (2 * step)), length)
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _bound(job: Callable[[slice], None], part: slice) -> Callable[[], None]:
    return lambda: job(part)
