"""Two models on the same documents: how far apart they are, and whether that could be chance.

Differences are taken document by document, which removes the variance between documents (Miller 2024,
arXiv 2411.00640), and resampled within each task. All draws are seeded: the same samples give the same numbers.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lewis.errors import LewisError
from lewis.evaluation.statistics.scores import Part, Samples, places_of

Array = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
CELLS = 4_000_000  # numbers drawn in one piece: 32 MB
ROUNDING = 1e-12
FEW = 20  # if fewer documents differ, resamples do not show how much the gain varies


class PairingError(LewisError):
    """Two models were not scored on the same documents, so they cannot be compared."""


@dataclass(frozen=True)
class Comparison:
    """How much better the candidate is than a reference on one metric. A positive gain is always better.

    Attributes:
        key: `task/metric,filter`.
        documents: on how many documents both models have a value.
        delta: gain of the candidate.
        low, high: the 95 % interval of the gain, from a paired bootstrap.
        wins, losses: documents on which the candidate is better, and worse.
        binary: whether every value is 0 or 1, in one task of which the metric skips the same documents for both models.
        p: two-sided, of the hypothesis that the models are equally good. McNemar's exact test if every value is 0 or 1,
            else a permutation test that swaps the two models' values (sign flips).
        draws: the resampled gains, sorted: fp64, shape (RESAMPLES,).
        cautious: computes such draws with one more document in each task: the one on which the two models differ most,
            as a loss of the candidate.
    """

    key: str
    documents: int
    delta: float
    low: float
    high: float
    wins: int
    losses: int
    binary: bool
    p: float
    draws: Array = field(repr=False, compare=False)
    cautious: Callable[[], Array] = field(repr=False, compare=False)

    @property
    def spread(self) -> float:
        """The standard error of the gain."""
        return float(self.draws.std())

    def p_inferior(self, tolerance: float) -> float:
        """One-sided p of the hypothesis that the candidate is worse by `tolerance` or more.

        Tango's test if every value is 0 or 1, else the share of `cautious` resamples in which the candidate is so much
        worse. A plain bootstrap is too sure where losses are rare and large: with 100 documents, a candidate that is
        worse by the tolerance passed in eight cases of a hundred instead of five.
        """
        if self.binary and 0 < tolerance < 1:
            return tango(self.wins, self.losses, self.documents, tolerance)
        draws = self.draws if self.binary else self.cautious()
        return float((1 + np.count_nonzero(~(draws > -tolerance))) / (1 + len(draws)))

    def p_superior(self, gain: float) -> float:
        """One-sided p of the hypothesis that the candidate is better by at least `gain`, or worse by at most `-gain`.

        For a `gain` of 0 it is half of the two-sided `p`, or 1 if the candidate is not worse; else as `p_inferior`.
        """
        if not gain:
            return self.p / 2 if self.delta < 0 else 1.0
        if self.binary and 0 < gain < 1:
            return tango(self.losses, self.wins, self.documents, gain)
        if self.binary and -1 < gain < 0:
            return 1 - self.p_inferior(-gain)
        return float((1 + np.count_nonzero(~(self.draws < gain))) / (1 + len(self.draws)))

    def p_unseen(self, difference: float) -> float:
        """The chance that a model which is worse by `difference`, in the metric's units, shows it on no document here.

        The same holds for a model that is better by `difference`. It is for scores from 0 to 1 of two models that
        differ on few documents: the bootstrap sees only losses and gains that a document has. If more documents differ,
        or all values are 0 or 1, it is 0, and the other tests decide.
        """
        few = not self.binary and self.wins + self.losses < FEW
        return max(1 - difference, 0.0) ** self.documents if few else 0.0


@functools.lru_cache(256)  # the gate, the tables and the reports ask for the same comparisons
def compare(
    candidate: Samples,
    reference: Samples,
    *,
    higher_is_better: bool = True,
    who: str = "the reference",
    whose: str = "the candidate",
) -> Comparison:
    """Compare two models document by document.

    Args:
        candidate, reference: the values of one metric.
        higher_is_better: of the metric.
        who, whose: names of the reference and of the candidate, for errors.

    Raises:
        PairingError: if the two were not scored on the same documents.
    """
    pairs = [_aligned(ours, theirs, who, whose) for ours, theirs in _parts(candidate, reference, who)]
    sign = 1.0 if higher_is_better else -1.0
    delta = sign * float(sum(_gain(part, sums.sum(axis=0)) for part, sums in pairs)) + 0.0  # no -0
    together = _together(pairs)
    draws = sign * _resampled(together, _gain) + 0.0
    low, high = _interval(draws)
    gains = [sum((sign * part.weight * _per_document(part, sums) for part, sums in of), np.zeros(1)) for of in together]
    better = np.concatenate(gains)
    binary = len(pairs) == 1 and all(
        part.aggregation == "mean"
        and bool(np.isin(sums[:, [0, 2]], (0, 1)).all())
        and bool((sums[:, 1] == sums[:, 3]).all())
        for part, sums in pairs
    )
    documents = sum(int(np.any([_of_both(sums) for _, sums in of], axis=0).sum()) for of in together)
    wins, losses = int((better > 0).sum()), int((better < 0).sum())
    p = mcnemar(wins, losses) if binary else _permutation(together, abs(delta))
    cautious = functools.cache(lambda: np.sort(sign * _resampled(list(map(_with_a_loss, together, gains)), _gain)))
    return Comparison(candidate.key, documents, delta, low, high, wins, losses, binary, p, np.sort(draws), cautious)


@functools.lru_cache(256)
def interval(samples: Samples) -> tuple[float, float]:
    """The 95 % interval of one model's value, in the metric's unit, from a percentile bootstrap over documents.

    It is (-inf, inf) if a draw is not finite, as from a single document.
    """
    return _interval(_resampled(_together([(part, part.sums()) for part in samples.parts]), _own))


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p of McNemar's test (1947): twice the tail of a binomial distribution, at most 1.

    Args:
        wins, losses: number of documents on which only the one model, and only the other, is right.
    """
    from scipy.special import bdtr  # slow to import, and a merge does not need it

    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def tango(wins: int, losses: int, documents: int, margin: float) -> float:
    """One-sided p of the hypothesis that the candidate is worse by `margin` or more, by Tango's score test (1998).

    The test is for two shares on the same documents (Statistics in Medicine 17, 891). Its variance is that of a model
    which is worse by just `margin`. So two models that agree on a few documents are not taken to agree on all.

    Args:
        wins, losses: number of documents on which only the candidate, and only the reference, is right.
        documents: their number, at least 1.
        margin: as a share of the documents, between 0 and 1.
    """
    both = documents - wins - losses
    linear = wins * (1 - 3 * margin) + losses * (1 - margin) - 2 * both * margin
    won = (linear + math.sqrt(linear**2 + 8 * documents * wins * margin * (1 - margin))) / (4 * documents)
    deviation = math.sqrt(documents * (2 * won + margin - margin**2))
    return math.erfc((wins - losses + documents * margin) / deviation / math.sqrt(2)) / 2


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for the number of tests, by Holm's method (1979).

    A test is significant if its adjusted p is at most the level at which one false alarm among all tests is allowed.

    Args:
        p: name of a test -> its p.
    """
    adjusted, largest = {}, 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p) - rank) * value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def table_cells(found: Comparison | None, label: str) -> dict[str, str]:
    """The columns of a comparison in a table, in which `label` names the candidate; empty cells without a comparison.

    An interval that is not finite, as from a single document, is left out.
    """
    columns = (f"gain of {label}", "95 % interval", "wins", "losses", "p")
    if found is None:
        return dict.fromkeys(columns, "")
    interval = f"{found.low:+.4g} to {found.high:+.4g}" if math.isfinite(found.high - found.low) else ""
    cells = (f"{found.delta:+.4g}", interval, str(found.wins), str(found.losses), f"{found.p:.3g}")
    return dict(zip(columns, cells, strict=True))


def _parts(candidate: Samples, reference: Samples, who: str) -> list[tuple[Part, Part]]:
    ours, theirs = ([part.task for part in each.parts] for each in (candidate, reference))
    if ours != theirs:
        raise PairingError(f"{candidate.key}: scored on {', '.join(ours)}, but {who} on {', '.join(theirs)}")
    return list(zip(candidate.parts, reference.parts, strict=True))


def _together(pairs: Sequence[tuple[Part, Array]]) -> list[list[tuple[Part, Array]]]:
    """Group the parts that have the same documents: metrics on the same documents vary together."""
    found: dict[tuple[str, tuple[str, ...]], list[tuple[Part, Array]]] = {}
    for part, sums in pairs:
        found.setdefault((part.task, part.documents), []).append((part, sums))
    return list(found.values())


def _with_a_loss(of: Sequence[tuple[Part, Array]], gains: Array) -> list[tuple[Part, Array]]:
    """Add the document on which the models differ most, as a loss of the candidate; a single document stays alone.

    `gains` are fp64, shape (documents,).
    """
    if len(gains) < 2:
        return list(of)
    most = int(np.abs(gains).argmax())
    order = [2, 3, 0, 1] if gains[most] > 0 else [0, 1, 2, 3]
    return [(part, np.vstack([sums, sums[most, order]])) for part, sums in of]


def _aligned(ours: Part, theirs: Part, who: str, whose: str) -> tuple[Part, Array]:
    """The sums of both models per document: fp64, shape (documents, 4), zero where a metric skips the document."""
    place = places_of(theirs.documents)
    order = places_of(ours.documents)
    if place.keys() != order.keys():
        raise PairingError(
            f"{ours.task}: not the same documents: {who} has {len(place)}, {whose} {len(order)}, and both have "
            f"{len(order.keys() & place.keys())} of them; score both with the same tasks, data and limit"
        )
    return ours, np.hstack([ours.sums(), theirs.sums()[[place[document] for document in order]]])


def _gain(part: Part, sums: Array) -> Array:
    """A part's share of candidate minus reference: fp64, shape (..., 4) -> (...)."""
    return part.weight * (part.aggregate(sums[..., :2]) - part.aggregate(sums[..., 2:]))


def _own(part: Part, sums: Array) -> Array:
    """A part's share of one model's value: fp64, shape (..., 2) -> (...)."""
    return part.weight * part.aggregate(sums)


def _resampled(together: Sequence[Sequence[tuple[Part, Array]]], statistic: Callable[[Part, Array], Array]) -> Array:
    """The statistic on resamples of the documents, drawn once for parts that are `together`: fp64, shape (RESAMPLES,).

    The variance of a bootstrap is too small by (n - 1) / n, so small samples would look more certain than they are.
    The distance of each draw from the observed value is therefore scaled by the square root of n / (n - 1).
    """
    rng, total = np.random.default_rng(0), np.zeros(RESAMPLES)
    for of in together:
        sums = np.hstack([each for _, each in of])
        count, observed = len(sums), _sum(statistic, of, sums.sum(axis=0))
        wider = math.sqrt(count / (count - 1)) if count > 1 else math.nan  # one document has no spread
        # Many documents have equal sums: right and wrong answers give only four kinds of rows.
        kinds, often = np.unique(sums, axis=0, return_counts=True)
        for rows in _chunks(RESAMPLES, len(kinds)):
            drawn = rng.multinomial(count, often / count, size=len(rows)).astype(np.float64)
            total[rows] += observed + wider * (_sum(statistic, of, drawn @ kinds) - observed)
    return total


def _sum(statistic: Callable[[Part, Array], Array], of: Sequence[tuple[Part, Array]], sums: Array) -> Array:
    """The statistic summed over parts whose sums are side by side: fp64, shape (..., columns) -> (...)."""
    each = np.split(sums, len(of), axis=-1)
    return np.sum([statistic(part, own) for (part, _), own in zip(of, each, strict=True)], axis=0)


def _chunks(rows: int, columns: int) -> Iterator[range]:
    """Split rows so that each piece has at most `CELLS` cells."""
    step = max(1, CELLS // max(columns, 1))
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))


def _interval(draws: Array) -> tuple[float, float]:
    if not np.isfinite(draws).all():
        return -math.inf, math.inf
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _per_document(part: Part, sums: Array) -> Array:
    """Candidate minus reference on each document: fp64, shape (documents,); 0 where a model has no value."""
    gain = part.aggregate(sums[:, :2]) - part.aggregate(sums[:, 2:])
    return np.nan_to_num(np.where(_of_both(sums), gain, 0.0))


def _of_both(sums: Array) -> NDArray[np.bool_]:
    """On which documents both models have a value: shape (documents,)."""
    both: NDArray[np.bool_] = (sums[:, 1] > 0) & (sums[:, 3] > 0)
    return both


def _permutation(together: Sequence[Sequence[tuple[Part, Array]]], observed: float) -> float:
    """Two-sided p of a gain when the two models' values are swapped at random on each document.

    The test is exact for exchangeable models, such as two copies of one model. If few documents differ, all possible
    swaps are counted instead of random ones. If no draw reaches the observed gain, Hoeffding's bound is used where it
    is smaller, but no p below the share of the two swaps, of no document and of all, that always reach the gain.
    """
    unequal = [np.any([(sums[:, :2] != sums[:, 2:]).any(axis=1) for _, sums in of], axis=0) for of in together]
    number = sum(int(each.sum()) for each in unequal)
    every = number <= math.log2(RESAMPLES)
    rounds, hits, squares = 2**number if every else RESAMPLES, 0, 0.0
    rng = np.random.default_rng(1)
    sizes = [_own(part, sums.sum(axis=0)[at : at + 2]) for of in together for part, sums in of for at in (0, 2)]
    least = observed - ROUNDING * max(1.0, float(np.abs(sizes).sum()))  # a perplexity of 1000 is rounded at 1e-13
    for rows in _chunks(rounds, number):
        if every:
            swapped = (np.array(rows)[:, None] >> np.arange(number)) & 1
        else:
            swapped = rng.integers(0, 2, (len(rows), number), dtype=np.int8)
        total, start = np.zeros(len(rows)), 0
        for of, where in zip(together, unequal, strict=True):
            end = start + int(where.sum())
            swaps, start = swapped[:, start:end].astype(np.float64), end
            for part, sums in of:
                moved = sums[where]
                change = np.hstack([moved[:, 2:] - moved[:, :2], moved[:, :2] - moved[:, 2:]])
                total += _gain(part, sums.sum(axis=0) + swaps @ change)
        hits += int(np.count_nonzero(~(np.abs(total) < least)))
        squares += float(total @ total)
    if every or hits:
        return hits / rounds if every else (1 + hits) / (1 + rounds)
    return min(1 / (1 + rounds), max(2.0 ** (1 - number), 2 * math.exp(-(observed**2) * rounds / (2 * squares))))
