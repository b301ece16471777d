"""How much is known of a gain after any number of documents, so that scoring may stop as soon as enough is known.

A bound here holds at all times at once: one may look after every document, and stop when one likes. It is that of a
gambler who bets against a mean of the paired differences. In a fair game the capital never becomes `1 / error` times
the stake but in a share `error` of all games (Ville 1939), so a mean against which it does is refuted. The gambler
divides the stake among several constant bets (Waudby-Smith and Ramdas 2023, arXiv 2010.09686).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lewis.evaluation.statistics.power import ERROR

BETS = 0.5 ** np.arange(1, 11)  # shares of the capital; 1 / 2 at most, so that no difference can ruin
STEPS = 40  # of a bisection, to 2e-12
LARGEST = 700.0  # logarithm of a capital; more would overflow

State = Literal["better", "not worse", "worse", "not known yet"]


def capital(differences: ArrayLike, mean: float) -> NDArray[np.float64]:
    """The capital, from 1, of bets that the mean of the differences is above `mean`: fp64, shape (documents,).

    Args:
        differences: candidate minus reference, one per document in the order of a random draw: shape (documents,), each
            in [-1, 1].
        mean: in [-1, 1].

    Raises:
        ValueError: if a difference is outside.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not (np.abs(values) <= 1).all():
        raise ValueError("expected differences from -1 to 1")
    logs = np.log1p(BETS[:, None] * (values - mean))
    result: NDArray[np.float64] = np.exp(np.minimum(np.cumsum(logs, axis=1), LARGEST)).mean(axis=0)
    return result


def bounds(differences: Sequence[float] | NDArray[np.float64], error: float = ERROR) -> tuple[float, float]:
    """The bounds of the mean of the differences; each, over all times, is wrong with a chance of at most `error`."""
    values = np.asarray(differences, dtype=np.float64)
    return _lower(values, error), -_lower(-values, error)


def state(
    differences: Sequence[float] | NDArray[np.float64], margin: float, gain: float = 0.0, error: float = ERROR
) -> State:
    """What is known of a candidate: `better` by more than `gain`; `not worse` by the margin, or `worse` by more.

    Args:
        differences: as of `capital`.
        margin: the gate's, of a score from 0 to 1.
        gain: the gate's `min_gain`.
        error: the chance that a candidate which is worse by the margin is ever called not worse, or one of no gain
            better; likewise that one which is not worse is ever called worse.
    """
    low, high = bounds(differences, error)
    if low > gain:
        return "better"
    if low > -margin:
        return "not worse"
    return "worse" if high < -margin else "not known yet"


def _lower(values: NDArray[np.float64], error: float) -> float:
    """The largest mean that was refuted from below at any time; -1 if none was."""
    low, high = -1.0, 1.0
    for _ in range(STEPS if len(values) else 0):
        middle = (low + high) / 2
        refuted = capital(values, middle).max() >= 1 / error
        low, high = (middle, high) if refuted else (low, middle)
    return low
