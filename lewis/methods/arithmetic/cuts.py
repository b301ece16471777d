"""Numbers that come in pieces, pass after pass, and are never all in memory: the k-th largest, and exactly the k first.

A pass counts into bins by the upper bits of the numbers; the next one looks into the bin that holds the k-th, and
collects it as soon as it is small enough. What it finds is exact, and the same for any pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sparsify import tie_order

_BITS = 17  # a pass tells apart this many bits of a number
_ROOM = 1 << 21  # numbers that are collected
_LAST = (1 << 63) - 1


@dataclass(frozen=True)
class Kth:
    """The k-th largest of many numbers.

    Attributes:
        key: its `keys`.
        wanted: how many of those that equal it are among the k largest.
        equal: how many equal it.
    """

    key: int
    wanted: int
    equal: int


@dataclass(frozen=True)
class Cut:
    """Which scores are among the k largest.

    Attributes:
        key: the `keys` of the smallest of them; None if there are none.
        last: of the scores that equal it, the last place that is among them, as `sparsify.tie_order` has it.
    """

    key: int | None
    last: int = _LAST

    def keeps(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Which of these scores are among them: bool, of their shape; the first one is number `start` of all."""
        found = keys(scores)
        if self.key is None:
            return torch.zeros_like(found, dtype=torch.bool)
        kept = found > self.key
        if self.last == _LAST:
            return kept | (found == self.key)
        ties = (found == self.key).reshape(-1).nonzero().reshape(-1)
        kept.view(-1)[ties] = tie_order(ties + start) <= self.last
        return kept


def cuts(passes: Callable[[], Iterator[tuple[int, Sequence[torch.Tensor]]]], counts: Sequence[int]) -> list[Cut]:
    """Find the k largest of each of several sets of scores; ties are broken as in `sparsify.largest`.

    Args:
        passes: gives, in pieces, the number of the first element and the scores of each set (fp32 or fp64, of one
            shape).
        counts: k of each set.

    Returns:
        One for each set.
    """

    def score_keys() -> Iterator[list[torch.Tensor]]:
        return ([keys(own) for own in scores] for _, scores in passes())

    def tie_keys() -> Iterator[list[torch.Tensor]]:
        for start, scores in passes():
            equal = [keys(own) == each.key for own, each in zip(scores, found, strict=True)]
            ties = [each.reshape(-1).nonzero().reshape(-1) for each in equal]
            yield [~tie_order(places + start) for places in ties]

    found = kth_largest(score_keys, counts)
    tied = [each.wanted if 0 < each.wanted < each.equal else 0 for each in found]
    last = kth_largest(tie_keys, tied)
    return [
        Cut(None) if k <= 0 else Cut(own.key, ~tie.key if number else _LAST)
        for k, own, tie, number in zip(counts, found, last, tied, strict=True)
    ]


def kth_largest(passes: Callable[[], Iterator[Sequence[torch.Tensor]]], ranks: Sequence[int]) -> list[Kth]:
    """Find the k-th largest of each of several sets of whole numbers.

    Args:
        passes: gives, in pieces, some of each set: int32 or int64 tensors of any shape.
        ranks: k of each set, at most its size; less than 1 for none.

    Returns:
        One for each set; what is told of a set without a rank means nothing.
    """
    searches = [_Search(rank) for rank in ranks]
    while not all(search.found for search in searches):
        for pieces in passes():
            for search, piece in zip(searches, pieces, strict=True):
                if not search.found:
                    search.look(piece.reshape(-1))
        for search in searches:
            if not search.found:
                search.narrow()
    return [search.found for search in searches if search.found]


def keys(numbers: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of fp32 (int32) or fp64 (int64) ones without NaN; -0.0 comes right before 0.0."""
    kind = torch.int32 if numbers.dtype == torch.float32 else torch.int64
    bits = numbers.contiguous().view(kind)
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)


def number_of(key: int) -> float:
    """The fp64 number of a key."""
    bits = key if key >= 0 else key ^ _LAST
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))


class _Search:
    """The search for one k-th largest: it lies in [low, low + 2^width)."""

    def __init__(self, rank: int) -> None:
        self.found: Kth | None = Kth(0, 0, 0) if rank < 1 else None
        self._wanted, self._low, self._width, self._total = rank, 0, 0, 0
        self._counts: torch.Tensor | None = None
        self._collected: list[torch.Tensor] | None = None

    def look(self, numbers: torch.Tensor) -> None:
        if self._width == 0:  # the first piece of all
            self._width = self._total = 8 * numbers.element_size()
            self._low = -(1 << (self._total - 1))
        if self._width < self._total:
            numbers = numbers[numbers >> self._width == self._low >> self._width]
        if self._collected is not None:
            self._collected.append(numbers)
            return
        shift = max(self._width - _BITS, 0)
        bins = (numbers >> shift) - (self._low >> shift)
        counts = torch.bincount(bins, minlength=1 << min(self._width, _BITS))
        self._counts = counts if self._counts is None else self._counts + counts

    def narrow(self) -> None:
        if self._collected is not None:
            numbers = torch.cat(self._collected)
            key = int(numbers.kthvalue(len(numbers) - self._wanted + 1).values)
            above, equal = int((numbers > key).sum()), int((numbers == key).sum())
            self.found = Kth(key, self._wanted - above, equal)
            return
        assert self._counts is not None
        up_to = self._counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(up_to, self._wanted))  # from above
        inside = int(self._counts[-1 - place])
        self._wanted -= int(up_to[place]) - inside
        shift = max(self._width - _BITS, 0)
        self._low += (len(self._counts) - 1 - place) << shift
        self._width, self._counts = shift, None
        if shift == 0:
            self.found = Kth(self._low, self._wanted, inside)
        elif inside <= _ROOM:
            self._collected = []
