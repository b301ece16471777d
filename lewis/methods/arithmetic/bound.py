"""A bound on how far a regression goes from its anchor: beyond it, the ridge is raised until the distance fits.

With X(r) = R (S + r I)^-1, the distance || X(r) ||_F falls as r grows, and 1 / || X(r) ||_F is a concave function of r
(Conn, Gould and Toint, Trust-Region Methods, 2000, section 7.3). So the chord through two points below the goal, or
through 0 and the first point, never passes it, and a few steps come close.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import Jobs, slices

CLOSE = 1.1  # times the bound: the rest is taken off by a factor
STEPS = 20  # at most; three are usual
FARTHEST = 1000.0  # times the ridge of the step before
ROWS = 384  # of a matrix that one job takes


def distance(matrix: torch.Tensor, anchor: torch.Tensor, jobs: Jobs) -> float:
    """|| matrix - anchor ||_F, for (out, in), of any floating dtype and of fp32, added in fp64 in a fixed order."""

    def job(part: slice) -> float:
        return float((matrix[part].float() - anchor[part]).double().square_().sum())

    return math.sqrt(sum(jobs([partial(job, part) for part in slices(len(anchor), ROWS)])))


def within(
    most: float,
    anchor: torch.Tensor,
    fitted: torch.Tensor,
    ridge: float,
    again: Callable[[float], None] | None,
    jobs: Jobs,
) -> bool:
    """Bring a fit to a distance of at most `most` from its anchor, if it is farther; return whether it was.

    Args:
        most: the largest || W - W_a ||_F; 0: the fit becomes the anchor.
        anchor: W_a, fp32 (out, in).
        fitted: W, fp32 (out, in); changed in place. One that is not finite stays as it is.
        ridge: r of the fit, absolute.
        again: writes the fit with another r into `fitted`; None: there is no such fit, the move is only made shorter.
        jobs: runs the jobs of the computation.
    """
    reached = distance(fitted, anchor, jobs)
    if reached <= most or not math.isfinite(reached):
        return False
    if most and again:
        before, here = (0.0, 0.0), (ridge, 1 / reached)
        for _ in range(STEPS):
            rise = here[1] - before[1]
            step = (1 / most - here[1]) * (here[0] - before[0]) / rise if rise > 0 else math.inf
            before, ridge = here, min(here[0] + step, FARTHEST * here[0])
            again(ridge)
            reached = distance(fitted, anchor, jobs)
            if reached <= CLOSE * most:
                break
            here = ridge, 1 / reached
    if reached > most:
        shorter = most / reached

        def job(part: slice) -> None:
            fitted[part] = anchor[part] + (fitted[part] - anchor[part]) * shorter

        jobs([partial(job, part) for part in slices(len(anchor), ROWS)])
    return True
