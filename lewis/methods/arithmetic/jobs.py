"""How sums and factors are cut into jobs: by their sizes only, so that any number of threads gives the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Jobs = Callable[[Sequence[Callable[[], None]]], None]
"""Runs jobs, each single-threaded, in any order, at the same time or one after another."""


def one_after_another(jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs one after another, in this thread: `Jobs` without threads."""
    for job in jobs:
        job()


def slices(length: int, step: int) -> list[slice]:
    """Cut a length into an even number of parts of nearly equal length, at most `step`."""
    count = min(2 * -(-length // (2 * step)), length)
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]
