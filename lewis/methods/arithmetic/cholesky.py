"""The Cholesky factor of a symmetric matrix, computed in blocks, so that most of the work is matrix products.

LAPACK's own routines run at a third of the speed of products on one core, and a whole factor is one job. Here each
block below the diagonal is a job of its own, and the blocks on the diagonal are inverted, so that solving takes matrix
products, too. The blocks depend on the size only: so the factor has the same bits for any number of threads.
"""

from __future__ import annotations

from functools import partial

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import Jobs, slices

BLOCK = 192


class Factor:
    """The Cholesky factor L of a matrix A = L L^T.

    Attributes:
        failed: whether A is not positive definite in fp64; then there is no factor.
        added: the number that A's diagonal has on top of that of the matrix it was made of.
    """

    def __init__(self, matrix: torch.Tensor, jobs: Jobs, added: float = 0.0) -> None:
        """
        Args:
            matrix: A, fp64 (n, n); only what is on and above the diagonal is read. It is kept.
            jobs: runs the jobs of the computation.
            added: what has been added to its diagonal.
        """
        self.added, self._matrix = added, matrix
        self._cuts, self._jobs = slices(len(matrix), BLOCK), jobs
        self._inverses: list[torch.Tensor] = []
        self._lower = torch.empty_like(matrix)
        self.failed = not all(self._add(matrix, i) for i in range(len(self._cuts)))

    def _add(self, matrix: torch.Tensor, i: int) -> bool:
        """Compute column `i` of blocks from those before it; return whether A is positive definite so far."""
        cut, lower = self._cuts[i], self._lower
        before = lower[cut, : cut.start]
        corner, failed = torch.linalg.cholesky_ex(matrix[cut, cut].T - before @ before.T)
        if int(failed):
            return False
        inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner), dtype=corner.dtype), upper=False)
        self._inverses.append(inverse)

        def job(rows: slice) -> None:
            lower[rows, cut] = (
                torch.addmm(matrix[cut, rows].T, lower[rows, : cut.start], before.T, alpha=-1) @ inverse.T
            )

        self._jobs([partial(job, rows) for rows in self._cuts[i + 1 :]])
        return True

    def raised(self, added: float) -> Factor:
        """Factor the same matrix with `added`, which is more than before, on its diagonal."""
        matrix = self._matrix.clone()
        matrix.diagonal().add_(added - self.added)
        return Factor(matrix, self._jobs, added)

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """Solve X A = R for X.

        Args:
            rows: R, fp64 (any, n); overwritten by X.
        """
        lower, pairs = self._lower, list(zip(self._cuts, self._inverses, strict=True))
        for cut, inverse in pairs:
            rows[:, cut].addmm_(rows[:, : cut.start], lower[cut, : cut.start].T, alpha=-1)
            rows[:, cut] = rows[:, cut] @ inverse.T
        for cut, inverse in reversed(pairs):
            rows[:, cut].addmm_(rows[:, cut.stop :], lower[cut.stop :, cut], alpha=-1)
            rows[:, cut] = rows[:, cut] @ inverse
        return rows


def factorised(matrix: torch.Tensor, ridge: float, jobs: Jobs, mean: float | None = None) -> Factor:
    """Factor a symmetric matrix, fp64, after adding `ridge` times its mean diagonal (or `mean`) to its diagonal.

    A ridge that is too small for the rounding errors of a singular matrix is raised tenfold until there is a factor.

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
        factor = Factor(matrix, jobs, added)
        if not factor.failed:
            return factor
        before, added = added, 10 * max(added, 1e-9 * mean)
