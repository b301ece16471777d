"""Ridge regression of one linear layer: the closed form behind RegMean and its forward-order form.

Let W_a be an anchor (for instance the base and the sum of the task vectors), W_t the weight of expert t, X_t the inputs
of the layer in the merged model and Z_t its inputs in expert t, one row per calibration token of expert t. The fit is

    W = argmin  sum_t c_t || X_t W^T - Z_t W_t^T - B_t ||_F^2 + r || W - W_a ||_F^2  =  W_a + R (S + r I)^-1
    S = sum_t c_t X_t^T X_t                                                          (in, in)
    R = sum_t c_t [ (W_t - W_a) X_t^T X_t + W_t (Z_t - X_t)^T X_t + B_t^T X_t ]        (out, in)

B_t, one row per token, is what the layer has to add to the expert's output: what the merged model's residual stream
lacks there, or the difference of the biases. It may be 0.

If the wanted outputs Y_t = Z_t W_t^T + B_t are known already, the same R takes fewer products:

    R = sum_t c_t Y_t^T X_t - W_a S

Both terms bring rounding errors, so this form is used only with ridges of `COARSE` or more, which suppress them.

With Z_t = X_t, the inputs in the experts, this is RegMean (arXiv 2212.09849, equation 3) with a ridge towards an
anchor; with the inputs of the model merged so far it is its form in forward order (FeatCal, arXiv 2605.13030). R is
written with differences, so that nothing is lost to rounding where the merged model is close to the experts.

With Z_t = X_t and B_t = 0, the fit needs of X_t only the mean of the products of its columns, X_t^T X_t / tokens, which
can be measured once and kept (`Gram`).

alpha, RegMean's factor of the off-diagonals, mixes this fit with one that takes each input alone, as if the inputs were
uncorrelated and B_t = 0: the off-diagonals of X_t^T X_t and (Z_t - X_t)^T X_t are multiplied by alpha, and so is
B_t^T X_t. alpha = 1 is the fit above; at 0, each column of W is a weighted mean of the experts' columns.

Where there are fewer tokens than inputs, the same solution follows from the tokens' own products (the dual form): with
X the rows of all X_t, each scaled by sqrt(c_t), and E those of X_t (W_t - W_a)^T + (Z_t - X_t) W_t^T, scaled alike,

    W = W_a + E^T (X X^T + r I)^-1 X         (E with the rows of B_t added)

A prior adds what the task vectors D_t = W_t - W_0 themselves say about the inputs that matter to their experts, where
the tokens are few: rows P_t with P_t^T P_t = n0 tau_t D_t^T D_t count as further tokens with Z_t = X_t and B_t = 0.
The factor tau_t = tr(X_t^T X_t / tokens) / tr(D_t^T D_t) brings them to the scale of the inputs (`prior`). They do not
count in the mean diagonal, by which the ridge is scaled. (Similar: the task vectors' covariance of ACTMat, arXiv
2604.01329.)

With alpha < 1, let Q be the part of the solution for which each input stands alone (`Uncorrelated`), D the diagonal
matrix (1 - alpha) diag(S) + r I, and L = alpha X D^-1. Woodbury's identity gives

    W = W_a + Q + (E - X Q^T)^T (X L^T + I)^-1 L

Where there are few tokens, the fit can go far from the anchor to fit their noise: the corrections B_t ask for it. So
the distance || W - W_a ||_F may be held to a bound. A fit beyond it is solved again with a larger r, this layer alone
(`bound`). In the primal form, the solution with r' follows from that with r:

    W' - W_a = (W - W_a) [ I - (r' - r) (S + r' I)^-1 ]

Every sum is cut into jobs in a way that depends on the shapes only, and each job runs single-threaded: so the result
has the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.bound import distance, within
from lewis.methods.arithmetic.cholesky import Factor, factorised
from lewis.methods.arithmetic.sums import Jobs, one_after_another, slices
from lewis.methods.arithmetic.tokens import Additions, Gram, Rows, Stacked
from lewis.methods.arithmetic.uncorrelated import Uncorrelated, shift_of_each

COLUMNS = 256  # columns of a product that one job computes
ROWS = 384  # output rows that one job solves for
COARSE = 1e-3  # ridges from this on can take R from the wanted outputs Y_t
DUAL_ABOVE = 8192  # a layer with more inputs is solved in the dual form, as products of all pairs take too much memory
DUAL_TOKENS = 4096  # tokens that the dual form keeps of such a layer, spread evenly

Again = Callable[[float], None]
"""Writes the solution with another r, absolute and larger than the first, into the result."""


def keeps_rows(size: int, tokens: int) -> bool:
    """Whether to keep a layer's inputs as rows, since they take less room and time than the products of all pairs.

    They do if there are fewer tokens than half the inputs, since the products are symmetric. A layer with more than
    `DUAL_ABOVE` inputs always keeps rows, at most `DUAL_TOKENS` of them.
    """
    return size > DUAL_ABOVE or tokens < size // 2


def sampled(size: int, tokens: int, total: int) -> torch.Tensor | None:
    """Choose the tokens of an expert that a layer is fitted on in the dual form: an even share if it is very wide.

    Args:
        size: number of inputs of the layer.
        tokens, total: number of tokens of the expert, and of all experts.

    Returns:
        Ascending indices, int64; None for all tokens.
    """
    if size <= DUAL_ABOVE or total <= DUAL_TOKENS:
        return None
    wanted = min(tokens, max(1, DUAL_TOKENS * tokens // total))
    return torch.arange(wanted) * tokens // wanted


@dataclass
class Inputs:
    """The inputs of layers that share them (q, k and v): results that depend on them alone are computed once.

    Attributes:
        experts: the tokens of each expert, or their mean products.
        ridge: r in units of the mean diagonal of S; it may be changed between two layers.
        jobs: runs the jobs of the computation.
        alpha: factor of the off-diagonals, in [0, 1].
        prior: rows of each expert's prior, for one layer; empty: no prior. It may be changed between two layers.
        bound: how far a fit may be from the anchor, || W - W_a ||_F, in units of the distance of the expert that is
            farthest from it (or, if none has moved, `reach` of `solve`); 0: any distance. It may be changed between two
            layers.
        held: how many fits the bound has held back so far.
    """

    experts: Sequence[Rows | Gram]
    ridge: float
    jobs: Jobs = one_after_another
    alpha: float = 1.0
    prior: Sequence[Rows] = ()
    bound: float = 0.0
    held: int = 0
    _grams: list[torch.Tensor] = field(default_factory=list)
    _shifts: list[torch.Tensor | None] | None = None
    _factor: tuple[float, Factor] | None = None  # the ridge, and what was factored with it
    _carried: tuple[float, list[torch.Tensor]] | None = None  # the ridge, and X_t^T X_t (S + r I)^-1

    @property
    def size(self) -> int:
        """Number of inputs of the layer."""
        return self.experts[0].size

    @property
    def is_dual(self) -> bool:
        """Whether to solve in the dual form: the primal one costs more, or is too large. It needs all experts' rows."""
        if any(isinstance(rows, Gram) for rows in self.experts):
            return False
        return keeps_rows(self.size, sum(rows.tokens for rows in (*self.experts, *self.prior)))

    @property
    def takes_outputs(self) -> bool:
        """Whether `solve` takes outputs Y_t; not if only one expert counts, which must come out bit by bit."""
        several = sum(rows.weight > 0 for rows in self.experts) > 1
        return several and not self.is_dual and self.alpha == 1 and self.ridge >= COARSE

    def solve(
        self,
        anchor: torch.Tensor,
        weights: Sequence[torch.Tensor],
        additions: Sequence[Additions] | None = None,
        out: torch.Tensor | None = None,
        whole: bool = False,
        reach: Callable[[], float] = float,
    ) -> torch.Tensor:
        """Fit one layer.

        Args:
            anchor: W_a, fp32 (out, in).
            weights: W_t of each expert, (out, in), of any floating dtype; brought to fp32 row by row.
            additions: B_t of each expert, in the parts of its rows.
            out: where the result goes, fp32 (out, in); it may be `anchor` itself. By default a new tensor.
            whole: whether `additions` holds Y_t instead of B_t; only where `takes_outputs`.
            reach: where no expert has moved the layer, gives the distance in whose units `bound` is, as a share of
                || W_a ||_F; by default 0: the layer stays as it is.

        Returns:
            W, fp32 (out, in).

        Raises:
            ValueError: if the inputs are not finite.
        """
        out = torch.empty_like(anchor) if out is None else out
        if self.size == 0 or all(rows.tokens == 0 for rows in (*self.experts, *self.prior)):
            return out.copy_(anchor)
        additions = additions or [None] * len(self.experts)
        anchor = anchor.clone() if self.bound and out is anchor else anchor
        if self.is_dual:
            factor, again = self._dual(anchor, weights, additions, out)
        else:
            factor, again = self._primal(anchor, weights, additions, out, whole)
        if self.bound:
            farthest = max(distance(weight, anchor, self.jobs) for weight in weights)
            most = self.bound * (farthest or reach() * distance(anchor, torch.zeros(1).expand_as(anchor), self.jobs))
            self.held += within(most, anchor, out, factor.added, again, self.jobs)
        return out

    # ----- the primal form

    def _primal(
        self,
        anchor: torch.Tensor,
        weights: Sequence[torch.Tensor],
        additions: Sequence[Additions],
        out: torch.Tensor,
        whole: bool = False,
    ) -> tuple[Factor, Again]:
        factor, products = self._factored()

        @cache
        def moved() -> torch.Tensor:
            return out - anchor

        def again(added: float) -> None:
            first, raised = moved(), factor.raised(added)

            def job(part: slice) -> None:
                pulled = raised.solve(first[part].double()).mul_(factor.added - added).add_(first[part])
                out[part] = (anchor[part].double() + pulled).float()

            self.jobs([partial(job, part) for part in slices(len(anchor), ROWS)])

        # Shifts Z_t - X_t are multiplied out over pairs of inputs, once for all layers that share them, or by token.
        by_token = any(x is not None for x in additions) or (self._shifts is None and 2 * len(anchor) <= self.size)
        if not by_token and self._shifts is None:
            self._shifts = [
                self._shift(each) if isinstance(each, Rows) and each.shifted else None for each in self.experts
            ]
        shifts = [None] * len(self.experts) if by_token or self._shifts is None else self._shifts
        carries = self._carried is not None or len(anchor) > len(self.experts) * self.size
        if carries and not self.prior and not by_token and not any(shift is not None for shift in shifts):
            self._from_carried(anchor, weights, factor, out)
            return factor, again
        alone = [
            shift_of_each(each.merged, each.own)
            if by_token and self.alpha < 1 and isinstance(each, Rows) and each.shifted
            else None
            for each in self.experts
        ]

        def job(part: slice) -> None:
            right = torch.zeros(part.stop - part.start, self.size, dtype=torch.float64)
            for rows, gram, weight in zip(self.prior, products, weights, strict=False):
                right.add_((weight[part].float() - anchor[part]) @ gram, alpha=rows.share)
            for rows, gram, shift, own_shift, weight, more in zip(
                self.experts, self._grams, shifts, alone, weights, additions, strict=True
            ):
                known = weight[part].float()
                found = (-anchor[part] if whole else known - anchor[part]) @ gram
                if whole and isinstance(rows, Rows):
                    for target, merged in zip(more or (), rows.merged, strict=True):
                        found.addmm_(target[:, part].T, merged)
                elif shift is not None:
                    found.addmm_(known, shift)
                elif by_token and isinstance(rows, Rows) and (rows.shifted or more is not None):
                    for i, (merged, own) in enumerate(zip(rows.merged, rows.own, strict=True)):
                        missed = (own - merged) @ known.T
                        missed = missed if more is None else missed.add_(more[i][:, part])
                        found.addmm_(missed.T, merged, alpha=self.alpha)
                    if own_shift is not None:
                        found.add_(known * own_shift, alpha=1 - self.alpha)
                right.add_(found, alpha=rows.share)
            out[part] = (anchor[part].double() + factor.solve(right)).float()

        self.jobs([partial(job, part) for part in slices(len(anchor), ROWS)])
        return factor, again

    def _from_carried(
        self, anchor: torch.Tensor, weights: Sequence[torch.Tensor], factor: Factor, out: torch.Tensor
    ) -> None:
        """W_a + sum_t c_t (W_t - W_a) [ X_t^T X_t (S + r I)^-1 ]; kept brackets make it quicker for many outputs."""
        if self._carried is None or self._carried[0] != self.ridge:
            carried = [torch.empty_like(products) for products in self._grams]

            def carry(into: torch.Tensor, products: torch.Tensor, part: slice) -> None:
                into[part] = factor.solve(products[part].double()).float()

            pairs, parts = list(zip(carried, self._grams, strict=True)), slices(self.size, ROWS)
            self.jobs([partial(carry, *pair, part) for pair in pairs for part in parts])
            self._carried = self.ridge, carried
        brackets = self._carried[1]

        def job(part: slice) -> None:
            start = anchor[part]
            moved = torch.zeros_like(start)
            for rows, bracket, weight in zip(self.experts, brackets, weights, strict=True):
                moved.addmm_(weight[part].float() - start, bracket, alpha=rows.share)
            out[part] = start + moved

        self.jobs([partial(job, part) for part in slices(len(anchor), ROWS)])

    def _factored(self) -> tuple[Factor, list[torch.Tensor]]:
        """The factor of S + r I, and the products P_t^T P_t of the prior, fp32 (in, in)."""
        if not self.prior:
            if self._factor is None or self._factor[0] != self.ridge:
                self._factor = self.ridge, factorised(self._sum_of_products(), self.ridge, self.jobs)
            return self._factor[1], []
        total = self._sum_of_products()
        mean = self._mean(total.diagonal())
        products = [torch.empty(self.size, self.size) for _ in self.prior]

        def job(columns: slice) -> None:
            for rows, gram in zip(self.prior, products, strict=True):
                self._multiply(rows, columns, gram)
                total[columns, columns.start :].add_(gram[columns, columns.start :], alpha=rows.share)

        self.jobs([partial(job, columns) for columns in slices(self.size, COLUMNS)])
        return factorised(total, self.ridge, self.jobs, mean), products

    def _mean(self, diagonal: torch.Tensor) -> float:
        """The mean diagonal of S, from numbers that sum to its trace; without tokens, that of the prior at n0 = 1."""
        return float(diagonal.sum()) / self.size or sum(rows.weight for rows in self.experts) / self.size

    def _multiply(self, rows: Rows | Gram, columns: slice, gram: torch.Tensor) -> None:
        """Write some rows of X_t^T X_t and, as it is symmetric, the same columns."""
        block = _product(rows, columns)
        self._damp(block, 0)
        gram[columns, columns.start :] = block
        gram[columns.start :, columns] = block.T

    def _sum_of_products(self) -> torch.Tensor:
        """S in fp64; puts each X_t^T X_t, fp32, into `_grams`. All are symmetric: only upper triangles are computed."""
        total, known = torch.empty(self.size, self.size, dtype=torch.float64), bool(self._grams)
        as_given = [isinstance(rows, Gram) and self.alpha == 1 for rows in self.experts]
        if not known:
            self._grams = [
                rows.mean if isinstance(rows, Gram) and same else torch.empty(self.size, self.size)
                for rows, same in zip(self.experts, as_given, strict=True)
            ]

        def job(columns: slice) -> None:
            summed = total[columns, columns.start :].zero_()
            for rows, gram, same in zip(self.experts, self._grams, as_given, strict=True):
                if not known and not same:
                    self._multiply(rows, columns, gram)
                summed.add_(gram[columns, columns.start :], alpha=rows.share)

        self.jobs([partial(job, columns) for columns in slices(self.size, COLUMNS)])
        return total

    def _damp(self, block: torch.Tensor, start: int) -> None:
        """Multiply the off-diagonal of some rows of a product by alpha; the diagonal begins at column `start`."""
        if self.alpha < 1:
            own = block.diagonal(start).clone()
            block.mul_(self.alpha).diagonal(start).copy_(own)

    def _shift(self, rows: Rows) -> torch.Tensor:
        """(Z_t - X_t)^T X_t, its off-diagonals multiplied by alpha."""
        shift = torch.empty(self.size, self.size)

        def job(columns: slice) -> None:
            block = torch.zeros(columns.stop - columns.start, self.size)
            for own, merged in zip(rows.own, rows.merged, strict=True):
                block.addmm_((own[:, columns] - merged[:, columns]).T, merged)
            self._damp(block, columns.start)
            shift[columns] = block

        self.jobs([partial(job, columns) for columns in slices(self.size, COLUMNS)])
        return shift

    # ----- the dual form

    def _dual(
        self, anchor: torch.Tensor, weights: Sequence[torch.Tensor], additions: Sequence[Additions], out: torch.Tensor
    ) -> tuple[Factor, Again | None]:
        known = [rows for rows in self.experts if isinstance(rows, Rows)]
        total = sum(rows.tokens for rows in known)
        taken = [*(sampled(self.size, rows.tokens, total) for rows in known), *[None] * len(self.prior)]
        stacked = Stacked([*known, *self.prior], [*additions, *[None] * len(self.prior)], taken)
        merged, more = stacked.merged, stacked.more
        parts, shifts = merged.split(stacked.counts), stacked.shifts
        weights = [*weights, *(weights if self.prior else ())]
        alone = None
        if self.alpha < 1:
            alone = Uncorrelated(parts, shifts, self.alpha)
            alone.add_ridge(self.ridge * self._mean(alone.diagonal(len(known))))
        left = merged if alone is None else merged * (self.alpha / alone.pull).float()
        if self._factor is not None and self._factor[0] == self.ridge and not self.prior:
            factor = self._factor[1]
        else:
            kernel = self._kernel(merged, left)
            of_tokens = kernel.diagonal()[: sum(stacked.counts[: len(known)])]
            ridge, mean = (self.ridge, self._mean(of_tokens)) if alone is None else (1.0, 1.0)
            factor = factorised(kernel, ridge, self.jobs, mean)
            self._factor = None if self.prior else (self.ridge, factor)  # the next layer has another prior
            del kernel
        errors: dict[int, torch.Tensor] = {}  # first row of a part -> E, kept where the fit may be solved again

        def solved(with_: Factor, missed: torch.Tensor) -> torch.Tensor:
            return with_.solve(missed.T.double().contiguous()).float() @ left

        def job(part: slice) -> None:
            start, known = anchor[part], [weight[part].float() for weight in weights]
            missed = torch.cat(
                [
                    x @ (weight - start).T + (0 if shift is None else shift @ weight.T)
                    for x, shift, weight in zip(parts, shifts, known, strict=True)
                ]
            )
            if more is not None:
                missed += more[:, part]
            if alone is not None:
                moved = alone.solution(start, known)
                missed -= merged @ moved.T
                start = start + moved
            if self.bound and alone is None:
                errors[part.start] = missed
            out[part] = start + solved(factor, missed)

        def again(added: float) -> None:
            raised = factor.raised(added)

            def job(part: slice) -> None:
                out[part] = anchor[part] + solved(raised, errors[part.start])

            self.jobs([partial(job, part) for part in slices(len(anchor), ROWS)])

        self.jobs([partial(job, part) for part in slices(len(anchor), ROWS)])
        return factor, again if alone is None else None

    def _kernel(self, merged: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """X L^T, fp64: with alpha = 1 the products of all pairs of tokens."""
        kernel = torch.empty(len(merged), len(merged), dtype=torch.float64)

        def multiply(columns: slice) -> None:
            kernel[columns] = (merged[columns] @ left.T).double()

        self.jobs([partial(multiply, columns) for columns in slices(len(merged), COLUMNS)])
        return kernel


def _product(rows: Rows | Gram, columns: slice) -> torch.Tensor:
    """Some rows of X_t^T X_t (of a `Gram` its mean), from the diagonal on."""
    if isinstance(rows, Gram):
        return rows.mean[columns, columns.start :].clone()
    block = torch.zeros(columns.stop - columns.start, rows.size - columns.start)
    for part in rows.merged:
        block.addmm_(part[:, columns].T, part[:, columns.start :])
    return block
