"""What a number of documents can show: margins, detectable losses and gains, and the error of each release.

Scores are from 0 to 1, such as the share of right answers. Two releases of one merge are assumed to differ on one
document in ten (`CHANGED`); a pair that differs on more needs more documents.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import NormalDist

ERROR = 0.05  # error rate of a test, one-sided
EQUAL = 0.9  # how often a default margin lets an equal model pass
POWER = 0.8  # how often a loss or a gain is detected
CHANGED = 0.1  # share of the documents on which two releases are assumed to differ
SMALLEST, LARGEST = 0.01, 0.1  # default margins

_Z = NormalDist().inv_cdf


def spent(number: int) -> float:
    """The one-sided error that the `number`-th version compared with one reference may spend.

    It is `ERROR / (number * (number + 1))`, 0.025 for the first. All of them together spend `ERROR`, so that of a
    hundred references at most five are ever replaced by a version that is no better.
    """
    return ERROR / (number * (number + 1))


def luck(versions: int) -> float:
    """The expected lead, by luck alone, of the best of `versions` equally good ones, in standard errors of a score.

    It is the mean of the largest of as many draws from a normal distribution, by Blom's approximation (1958).
    """
    return _Z((versions - 0.375) / (versions + 0.25)) if versions > 1 else 0.0


def spread(parts: Iterable[tuple[float, int]]) -> float:
    """The expected standard error of the difference between the scores of two releases, in the score's unit.

    It is the square root of `CHANGED` times the sum of weight² / documents: two releases differ by 1 on a share
    `CHANGED` of the documents, and by 0 on the others, so the difference on one document has the variance `CHANGED`.

    Args:
        parts: each task's weight in the score, and its number of documents.
    """
    return math.sqrt(CHANGED * sum(weight**2 / documents for weight, documents in parts))


def sums_by_task(numbers: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Task -> the sum of its numbers: several metrics of a task have its documents in common, so they vary together."""
    found = defaultdict[str, float](float)
    for task, number in numbers:
        found[task] += number
    return found


def margin(spread: float, tests: int = 1) -> float:
    """The default margin: a model that is equal to the champion passes all `tests` of a gate in nine cases of ten.

    In a long row of versions on the same documents it passes in three cases of four, since each champion was picked
    with its luck on them (`tests/benchmarks/releases.py`). The margin is at least `SMALLEST` and at most `LARGEST`:
    with few documents an equal model passes less often.

    Args:
        spread: standard error of the gain, as `spread` gives it; the margin has its unit.
        tests: how many tasks the gate tests.
    """
    return min(max((_Z(1 - ERROR) + _Z(EQUAL ** (1 / tests))) * spread, SMALLEST), LARGEST)


def loss_seen(margin: float, spread: float) -> float:
    """The loss at which a version is refused in four cases of five; 0 if an equal version is refused so often.

    `margin` and `spread` are what the functions of these names give; all three are in the score's unit.
    """
    return max(margin - (_Z(1 - ERROR) - _Z(POWER)) * spread, 0.0)


def gain_seen(spread: float, number: int, least: float = 0.0) -> float:
    """The gain at which the `number`-th version is found better, and better by `least`, in four cases of five.

    `spread` is what the function of that name gives; all are in the metric's units. A version that gains documents
    differs from the champion on these too, not only on the share `CHANGED` of all. That widens the spread.
    """

    def beyond(start: float, deviations: float) -> float:
        """The gain that lies so many standard errors above `start`."""
        small = (deviations * spread) ** 2  # (gain - start)**2 = small * (1 + gain / CHANGED)
        half = start + small / (2 * CHANGED)
        return half + math.sqrt(half**2 - start**2 + small)

    return max(beyond(0.0, _Z(1 - spent(number)) + _Z(POWER)), beyond(least, _Z(POWER)) if least else 0.0)
