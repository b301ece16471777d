"""Which elements of a task vector are kept: by a cut at exactly k (`sparsify.largest`), or by rank (`drop_by_rank`).

A sample tells roughly where the cut is. One pass over the tensor then counts what lies above that bracket and collects
what lies inside, a few percent; the exact cut is found among those. A bracket that misses, or holds too many, is
moved, and each pass leaves fewer scores that can be the cut: so it ends, and what it gives depends on no sample.
SCE's selection, of numbers that several experts have in common, goes by `methods.cuts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lewis.lazy_torch import torch
from lewis.merge import kernels
from lewis.methods.arithmetic.sparsify import SPREAD

NOTHING = (kernels.NONE, np.uint64(0))
EVERYTHING = (np.uint32(0), kernels.ALL)
_TOP = 0x7FFFFFFF
_LAST = int(kernels.ALL)
_ROOM = 1 << 20  # scores that a pass can collect
_CHUNK = 1 << 19  # elements whose variances are in memory
_WIDTH = 3.5  # half of a bracket, in standard errors of the sample


@dataclass(frozen=True)
class Pair:
    """A base's tensor and an expert's, as the kernels take them.

    Attributes:
        addresses: base's address and kind, expert's address and kind, elements, columns, address of the scale's layout.
    """

    addresses: tuple[np.uint64, int, np.uint64, int, int, int, np.uint64]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.addresses[4]


class Ranks:
    """Which elements `sparsify.drop_by_rank` keeps, a chunk at a time: the rows that it touches are sorted."""

    def __init__(self, pair: Pair, key: np.uint64, density: float, epsilon: float) -> None:
        self._pair, self._key = pair, key
        self._chances = np.float32(density - epsilon), np.float32(2 * epsilon)

    def kept(self, start: int, stop: int) -> np.ndarray:
        """For the elements from `start` to `stop`, 1 if it is kept, else 0; uint8."""
        columns = self._pair.addresses[5]
        first, last = start // columns, -(-stop // columns)
        keys = np.empty((last - first, columns), np.uint64)
        kernels.sort_keys(*self._pair.addresses, first * columns, keys)
        keys.sort(axis=-1)
        kept = np.empty(keys.size, np.uint8)
        kernels.draw_by_rank(keys, first * columns, self._key, *self._chances, kept)
        return kept[start - first * columns : stop - first * columns]


class Spread:
    """Which elements SCE selects, those in which experts differ most, a chunk at a time."""

    def __init__(self, addresses: np.ndarray, kinds: np.ndarray, size: int, share: float) -> None:
        from lewis.methods.arithmetic.cuts import cuts  # with torch, which no other merge has to load

        self._addresses, self._kinds = addresses, kinds
        starts = range(0, size, _CHUNK)
        number = sum(np.count_nonzero(self._variances(start, min(start + _CHUNK, size))) for start in starts)

        def passes() -> Iterator[tuple[int, list[torch.Tensor]]]:
            return ((start, [torch.from_numpy(self._variances(start, min(start + _CHUNK, size)))]) for start in starts)

        [self._cut] = cuts(passes, [int(number * share)])

    def kept(self, start: int, stop: int) -> np.ndarray:
        """For the elements from `start` to `stop`, 1 if it is kept, else 0; uint8."""
        kept: np.ndarray = self._cut.keeps(torch.from_numpy(self._variances(start, stop)), start).numpy()
        return kept.view(np.uint8)

    def _variances(self, start: int, stop: int) -> np.ndarray:
        found = np.empty(stop - start, np.float32)
        kernels.variances(self._addresses, self._kinds, start, found)
        return found


class Selector:
    """Finds cuts one after another; each thread has its own, for the memory it works in."""

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
        low, high, floor, top = 0, _TOP, 0, _TOP  # the cut lies in [floor, top]; [low, high] is looked at
        if pair.size > _ROOM // 2:
            low, high = self._bracket(self._sample(pair), k / pair.size)
        while True:
            above, inside, kept = kernels.scan(
                *pair.addresses, np.uint32(low), np.uint32(high), self._found, self._places
            )
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
        kernels.sample(*pair.addresses, pair.size // runs, scores)
        return scores.view(np.uint32)

    @staticmethod
    def _bracket(sample: np.ndarray, share: float) -> tuple[int, int]:
        """Between which two scores the cut probably lies, by a sample of which `share` is above it."""
        n = sample.size
        spread = _WIDTH * math.sqrt(n * share * (1 - share)) + 4
        places = [min(max(math.floor(n * (1 - share) + sign * spread), 0), n - 1) for sign in (-1, 1)]
        low, high = (int(np.partition(sample, place)[place]) for place in places)  # both at once is much slower
        return (0 if places[0] == 0 else low), (_TOP if places[1] == n - 1 else high)

    def _narrower(self, sample: np.ndarray, share: float, low: int, high: int) -> tuple[int, int]:
        """A bracket within [low, high] that holds fewer scores; at last one score alone."""
        first, last = self._bracket(sample, share)
        first, last = max(first, low), min(last, high)
        if (first, last) == (low, high):
            place = min(int(sample.size * (1 - share)), sample.size - 1)
            first = last = int(np.partition(sample, place)[place])
        return first, last

    def _among(self, count: int, wanted: int) -> tuple[np.uint32, np.uint64]:
        """The cut that keeps `wanted` of the scores that were collected."""
        scores = self._found[:count]
        threshold = np.partition(scores, count - wanted)[count - wanted]
        ties = self._places[:count][scores == threshold]
        wanted -= int(np.count_nonzero(scores > threshold))
        if wanted == ties.size:
            return threshold, kernels.ALL
        order = ties.view(np.uint64) * SPREAD
        return threshold, np.partition(order, wanted - 1)[wanted - 1]

    def _last_tie(self, pair: Pair, score: int, wanted: int, ties: int) -> np.uint64:
        """The place in the order of ties of the last of `ties` equal scores that is kept; `wanted` are.

        Their places are spread evenly over [0, 2^64), so where to look needs no sample.
        """
        if wanted == ties:
            return kernels.ALL
        found = self._places.view(np.uint64)
        floor, top, before_floor, up_to_top = 0, _LAST, 0, ties
        while True:
            share = (wanted - before_floor) / (up_to_top - before_floor)
            spread = min(8 / math.sqrt(up_to_top - before_floor), 0.25)
            low = floor + int((top - floor) * max(share - spread, 0))
            high = floor + int((top - floor) * min(share + spread, 1))
            before, inside, kept = kernels.scan_ties(
                *pair.addresses, np.uint32(score), np.uint64(low), np.uint64(high), found
            )
            if before >= wanted:
                top, up_to_top = low - 1, before
            elif before + inside < wanted:
                floor, before_floor = high + 1, before + inside
            elif inside == kept:
                return np.partition(found[:kept], wanted - before - 1)[wanted - before - 1]
            else:
                floor, top, before_floor, up_to_top = low, high, before, before + inside
