"""Which elements of a task vector the compiled loops keep.

* By size: `Selector` finds the cut above which exactly k elements lie, as `sparsify.largest` does.
* By rank in the row, at random: `Ranks`, as `sparsify.drop_by_rank`.
* By variance over the experts: `Varied`, for all experts alike.

`Kept` brings together what one method keeps of one task vector.

The selector takes a sample, which says roughly where the cut is, and brackets it. One pass over the tensor counts the
scores above the bracket and collects those inside, a few percent; the exact cut is found among those. A bracket that
misses the cut, or holds too many scores, is moved. Each pass leaves fewer scores that can be the cut, so the search
ends, and its result does not depend on the sample.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lewis.lazy_torch import torch
from lewis.merging.engine import kernels
from lewis.merging.memory_budget import chunks
from lewis.methods.arithmetic.cuts import cuts
from lewis.methods.arithmetic.sums import exact_sum

NOTHING = (kernels.NONE, np.uint64(0))  # the cut that keeps nothing
EVERYTHING = (np.uint32(0), kernels.ALL)
_TOP = 0x7FFFFFFF
_LAST = int(kernels.ALL)
_ROOM = 1 << 20  # scores that a pass can collect
_WIDTH = 3.5  # half of a bracket, in standard errors of the sample
_own = threading.local()


class Pair(NamedTuple):
    """A base's tensor and an expert's, in the order in which the kernels take them.

    Attributes:
        base, base_kind: address and dtype of the base's tensor, as in `Inputs`.
        own, own_kind: address and dtype of the expert's tensor.
        size: number of elements.
        columns: length of the last dimension.
        scale: address of the layout of the scale that elements are ranked by, as in `ScaleLayouts`; 0: none.
    """

    base: np.uint64
    base_kind: int
    own: np.uint64
    own_kind: int
    size: int
    columns: int
    scale: np.uint64


class Ranks:
    """The elements that `sparsify.drop_by_rank` keeps, a chunk at a time: the rows that a chunk touches are sorted."""

    def __init__(self, pair: Pair, key: np.uint64, density: float, epsilon: float) -> None:
        self._pair, self._key = pair, key
        self._chances = np.float32(density - epsilon), np.float32(2 * epsilon)

    def kept(self, start: int, stop: int) -> np.ndarray:
        """Return the mask of the elements from `start` to `stop`: uint8, 1 if an element is kept, else 0."""
        columns = self._pair.columns
        first, last = start // columns, -(-stop // columns)
        keys = np.empty((last - first, columns), np.uint64)
        kernels.sort_keys(*self._pair, first * columns, keys)
        keys.sort(axis=-1)
        kept = np.empty(keys.size, np.uint8)
        kernels.draw_by_rank(keys, first * columns, self._key, *self._chances, kept)
        return kept[start - first * columns : stop - first * columns]


class Varied:
    """The elements in which experts differ most, a chunk at a time.

    Of the elements whose variance over the experts is not 0, the given share is kept, largest variance first.
    """

    def __init__(self, addresses: np.ndarray, kinds: np.ndarray, size: int, share: float) -> None:
        """Find the cut between the variances that are kept and the others.

        Args:
            addresses, kinds: of the base, then of each expert, as in `Inputs`.
            size: number of elements.
            share: fraction kept, in [0, 1].
        """
        self._addresses, self._kinds = addresses, kinds
        number = sum(np.count_nonzero(self._variances(*chunk)) for chunk in chunks(size))

        def passes() -> Iterator[tuple[int, list[torch.Tensor]]]:
            return ((start, [torch.from_numpy(self._variances(start, stop))]) for start, stop in chunks(size))

        [self._cut] = cuts(passes, [int(number * share)])

    def kept(self, start: int, stop: int) -> np.ndarray:
        """Return the mask of the elements from `start` to `stop`: uint8, 1 if an element is kept, else 0."""
        kept: np.ndarray = self._cut.keeps(torch.from_numpy(self._variances(start, stop)), start).numpy()
        return kept.view(np.uint8)

    def _variances(self, start: int, stop: int) -> np.ndarray:
        found = np.empty(stop - start, np.float32)
        kernels.variances(self._addresses, self._kinds, start, found)
        return found


class Selector:
    """Finds cuts, one after another; each thread needs its own selector, since it holds the memory of the search."""

    def __init__(self) -> None:
        self._found = np.empty(_ROOM, np.uint32)
        self._places = np.empty(_ROOM, np.int64)

    def cut(self, pair: Pair, k: int) -> tuple[np.uint32, np.uint64]:
        """The cut that keeps exactly the `k` elements of the largest score, k in [0, size].

        Returns:
            The bits of the smallest score that is kept, and the last place in the order of ties that is kept with it.
        """
        if k <= 0:
            return NOTHING
        if k >= pair.size:
            return EVERYTHING
        low, high, floor, top = 0, _TOP, 0, _TOP  # the cut lies in [floor, top]; a pass looks at [low, high]
        if pair.size > _ROOM // 2:
            low, high = self._bracket(self._sample(pair), k / pair.size)
        while True:
            above, inside, kept = kernels.scan(*pair, np.uint32(low), np.uint32(high), self._found, self._places)
            if above >= k:
                low, high, floor = high + 1, top, high + 1
            elif above + inside < k:
                low, high, top = floor, low - 1, low - 1
            elif inside == kept:
                return self._among(kept, k - above)
            elif low == high:
                return np.uint32(low), self._last_tie(pair, low, k - above, inside)
            else:
                floor, top = low, high
                low, high = self._narrower(self._found[:kept], (k - above) / inside, low, high)

    def _sample(self, pair: Pair) -> np.ndarray:
        runs = min(max(pair.size // (64 * kernels.RUN), 256), 4096)
        scores = np.empty(runs * kernels.RUN, np.float32)
        kernels.sample(*pair, pair.size // runs, scores)
        return scores.view(np.uint32)

    @staticmethod
    def _bracket(sample: np.ndarray, share: float) -> tuple[int, int]:
        """Two scores between which the cut probably lies, if the fraction `share` of all scores is above the cut."""
        n = sample.size
        spread = _WIDTH * math.sqrt(n * share * (1 - share)) + 4
        places = [min(max(math.floor(n * (1 - share) + sign * spread), 0), n - 1) for sign in (-1, 1)]
        low, high = (int(kernels.nth(sample, place)) for place in places)
        return (0 if places[0] == 0 else low), (_TOP if places[1] == n - 1 else high)

    def _narrower(self, sample: np.ndarray, share: float, low: int, high: int) -> tuple[int, int]:
        """A bracket within [low, high] that holds fewer scores; in the end only one score."""
        first, last = self._bracket(sample, share)
        first, last = max(first, low), min(last, high)
        if (first, last) == (low, high):
            place = min(int(sample.size * (1 - share)), sample.size - 1)
            first = last = int(kernels.nth(sample, place))
        return first, last

    def _among(self, count: int, wanted: int) -> tuple[np.uint32, np.uint64]:
        """The cut that keeps the `wanted` largest of the `count` scores that were collected."""
        scores, places = self._found[:count], self._places[:count]
        threshold = np.uint32(kernels.nth(scores, count - wanted))
        above, ties = kernels.order_ties(scores, places, threshold)
        wanted -= above
        if wanted == ties:
            return threshold, kernels.ALL
        order = places[:ties].view(np.uint64)
        order.partition(wanted - 1)  # in place: a copy would be of fresh memory each time
        return threshold, order[wanted - 1]

    def _last_tie(self, pair: Pair, score: int, wanted: int, ties: int) -> np.uint64:
        """The place, in the order of ties, of the last score that is kept if `wanted` of `ties` equal scores are kept.

        Their places are spread evenly over [0, 2^64), so no sample is needed to know where to look.
        """
        if wanted == ties:
            return kernels.ALL
        found = self._places.view(np.uint64)
        floor, top, before_floor, up_to_top = 0, _LAST, 0, ties
        while True:
            share = (wanted - before_floor) / (up_to_top - before_floor)
            spread = min(8 / math.sqrt(up_to_top - before_floor), 0.25)
            low = floor + int((top - floor) * max(share - spread, 0))
            high = min(floor + int((top - floor) * min(share + spread, 1)), top)  # rounding can lead beyond it
            before, inside, kept = kernels.scan_ties(*pair, np.uint32(score), np.uint64(low), np.uint64(high), found)
            if before >= wanted:
                top, up_to_top = low - 1, before
            elif before + inside < wanted:
                floor, before_floor = high + 1, before + inside
            elif inside == kept:
                return np.partition(found[:kept], wanted - before - 1)[wanted - before - 1]
            else:
                floor, top, before_floor, up_to_top = low, high, before, before + inside


class Kept:
    """What is kept of one task vector.

    Attributes:
        thresholds, cuts: an element is kept if it lies in the first cut but not in the second; uint32 and uint64, shape
            (2,) each.
        factor: factor that brings the kept part to the L1 norm of the whole task vector, or 1; fp32.
    """

    def __init__(
        self,
        pair: Pair,
        density: float,
        *,
        outliers: float = 0.0,
        key: np.uint64 | None = None,
        rank_width: float | None = None,
        rescale: bool = False,
    ) -> None:
        """Find the cuts, or prepare the draw by rank, and compute the factor.

        Args:
            pair: the tensor of the base and of the expert.
            density: fraction kept.
            outliers: fraction of the largest elements that is dropped first.
            key: of the expert's random stream, if elements are dropped at random.
            rank_width: half the width of the probabilities by rank; None if all elements have the same one.
            rescale: whether the kept part is brought to the L1 norm of the whole.
        """
        k = int(density * pair.size)
        self._ranks: Ranks | None = None
        within, without = EVERYTHING, NOTHING
        if k >= pair.size if key is None else density >= 1:
            rescale = False
        elif key is None:
            dropped = min(int(outliers * pair.size), pair.size - k) if k > 0 else 0
            within, without = _selector().cut(pair, dropped + k), _selector().cut(pair, dropped)
        elif rank_width is not None and density > 0:
            self._ranks = Ranks(pair, key, density, rank_width)
        self.thresholds = np.array([within[0], without[0]], np.uint32)
        self.cuts = np.array([within[1], without[1]], np.uint64)
        self.factor = self._factor(pair, key, np.float32(density)) if rescale else np.float32(1)

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        """The mask of the elements from `start` to `stop`, as `Ranks.kept`; None if they are not kept by rank."""
        return self._ranks.kept(start, stop) if self._ranks else None

    def _factor(self, pair: Pair, key: np.uint64 | None, density: np.float32) -> np.float32:
        """Compute the factor by which `sparsify.match_l1` scales the kept part."""
        dropping, key = key is not None, np.uint64(0) if key is None else key
        blocks = -(-pair.size // kernels.BLOCK)
        whole, kept = np.empty(blocks), np.empty(blocks)
        for start, stop in chunks(pair.size):
            mask = self.mask(start, stop)
            part = slice(start // kernels.BLOCK, -(-stop // kernels.BLOCK))
            kernels.norms(
                *pair, self.thresholds, self.cuts, dropping, key, density, address_of(mask), start,
                whole[part], kept[part],
            )  # fmt: skip
        before, after = exact_sum(whole.tolist()), exact_sum(kept.tolist())
        return np.float32(1) if after == 0 or before == after else np.float32(before / after)


def address_of(mask: np.ndarray | None) -> np.uint64:
    """The address of a mask, or 0 for none, as the kernels take it."""
    return np.uint64(0 if mask is None else mask.ctypes.data)


def _selector() -> Selector:
    if not hasattr(_own, "selector"):
        _own.selector = Selector()
    selector: Selector = _own.selector
    return selector
