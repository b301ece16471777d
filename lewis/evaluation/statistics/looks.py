"""When an evaluation may end early: after how many documents the gate looks, and how much error each look may use.

Each look has twice the documents of the one before, drawn at random. A test that is made at every look would be wrong
more often than a test that is made once. So a look may spend only a part of a test's error, and all parts add up to it:
this holds for any test, and however much the looks have in common (Bonferroni). Most of the error of a pass is left for
the last look, which has all documents. So an evaluation that may end early detects nearly as much as one that may not.
A bound that holds at all times (Waudby-Smith and Ramdas 2023) has no such last look: with the documents for which a
gate's margin lets nine of ten equal models pass, it lets five pass (`tests/benchmarks/looks.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FIRST = 32  # documents of each task at the first look
EARLY = 0.2  # share of the error of a pass that the looks before the last one spend together

Stop = Literal["never", "worse", "known"]


@dataclass(frozen=True)
class Look:
    """The gate's look at a part of the documents, or at all of them.

    Attributes:
        documents: how many of each task, or all of a task that has no more; None: all.
        pools: task -> how many documents it has in all.
        passing: share of a test's error that a pass may spend; 0: nothing passes.
        failing: share of the same error that may be spent on calling a model worse that is not.
    """

    documents: int | None = None
    pools: Mapping[str, int] = field(default_factory=dict)
    passing: float = 1.0
    failing: float = 1.0

    @property
    def of(self) -> int:
        """The number of documents of the largest task."""
        return max(self.pools.values(), default=0)

    @property
    def after(self) -> int | None:
        """The number of documents of each task at the next look; None: all."""
        return next((size for size in sizes(self.of) if self.documents and size > self.documents), None)


def sizes(documents: int) -> list[int]:
    """The sizes of the looks before the last one, which has all documents: each has at most two thirds of them."""
    found, size = list[int](), FIRST
    while 3 * size <= 2 * documents:
        found.append(size)
        size *= 2
    return found


def look_at(stop: Stop, documents: int | None, pools: Mapping[str, int]) -> Look:
    """The look of an evaluation after so many documents, with the error that it may spend.

    Args:
        stop: `worse`: it ends early once it is certain that the gate refuses; `known`: also once it is certain that it
            does not.
        documents: of each task; None: all.
        pools: as of `Look`.
    """
    planned = sizes(max(pools.values(), default=0))
    if documents is None:
        return Look(None, pools, 1 - EARLY if stop == "known" and planned else 1.0)
    if documents not in planned:  # the next look would be the last one, with all documents
        return Look(documents, pools, 0.0, 0.0)
    return Look(documents, pools, EARLY / len(planned) if stop == "known" else 0.0, 1 / len(planned))
