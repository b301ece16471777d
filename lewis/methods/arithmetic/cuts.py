"""Find the k largest of numbers that are read in pieces, in several passes, and are never all in memory.

The first pass counts the numbers in bins by their upper bits. Each further pass looks only at the bin that holds the
k-th largest, and collects its numbers as soon as they are few enough. The result is exact, and the same for any pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sparsify import tie_order

_BITS = 17  # bits of a number that one pass sorts into bins
_ROOM = 1 << 21  # numbers that are collected at most
_LAST = (1 << 63) - 1


@dataclass(frozen=True)
class Kth:
    """The k-th largest of many numbers.

    Attributes:
        key: the number, as a whole number (`keys`).
        wanted: how many of the numbers equal to it are among the k largest.
        equal: how many numbers are equal to it.
    """

    key: int
    wanted: int
    equal: int


@dataclass(frozen=True)
class Cut:
    """Which scores are among the k largest.

    Attributes:
        key: the smallest of the k largest, as a whole number (`keys`); None if k is 0.
        last: of the scores equal to it, those up to this place of `sparsify.tie_order` are among the k largest.
    """

    key: int | None
    last: int = _LAST

    def keeps(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Which of these scores are among the k largest: bool, same shape; `start` is the number of the first score."""
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
        passes: called once per pass; yields for each piece the number of its first element and the scores of each set
            (fp32 or fp64, all of one shape).
        counts: k of each set.

    Returns:
        One `Cut` for each set.
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
        passes: called once per pass; yields for each piece some numbers of each set: int32 or int64, of any shape.
        ranks: k of each set, at most its size; less than 1: nothing is looked for.

    Returns:
        One `Kth` for each set; for a rank less than 1 it has no meaning.
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
    """Map fp32 to int32, or fp64 to int64, so that the order stays; no NaN, and -0.0 comes right before 0.0."""
    kind = torch.int32 if numbers.dtype == torch.float32 else torch.int64
    bits = numbers.contiguous().view(kind)
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)


def number_of(key: int) -> float:
    """The fp64 number that `keys` maps to this key."""
    bits = key if key >= 0 else key ^ _LAST
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))


class _Search:
    """The search for one k-th largest number, which lies in [low, low + 2^width)."""

    def __init__(self, rank: int) -> None:
        self.found: Kth | None = Kth(0, 0, 0) if rank < 1 else None
        self._wanted, self._low, self._width, self._total = rank, 0, 0, 0
        self._counts: torch.Tensor | None = None
        self._collected: list[torch.Tensor] | None = None

    def look(self, numbers: torch.Tensor) -> None:
        if self._width == 0:  # this is the first piece
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
        place = int(torch.searchsorted(up_to, self._wanted))  # counted from the top bin
        inside = int(self._counts[-1 - place])
        self._wanted -= int(up_to[place]) - inside
        shift = max(self._width - _BITS, 0)
        self._low += (len(self._counts) - 1 - place) << shift
        self._width, self._counts = shift, None
        if shift == 0:
            self.found = Kth(self._low, self._wanted, inside)
        elif inside <= _ROOM:
            self._collected = []
