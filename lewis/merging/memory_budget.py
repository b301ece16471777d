"""How much of a merge is in memory at a time: tensors in torch within a budget, and chunks in the compiled loops."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK = 1 << 19  # elements; a multiple of the blocks that `kernels` sums over


def chunks(size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each chunk of a tensor of `size` elements; the compiled loops read and write one at a time."""
    return ((start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


class MemoryBudget:
    """A number of elements that threads may have in memory together.

    Attributes:
        size: elements.
    """

    def __init__(self, size: int) -> None:
        self.size, self._left, self._changed = size, size, threading.Condition()

    @contextmanager
    def take(self, elements: int) -> Iterator[None]:
        """Wait until this many elements, at most `size`, are free, and hold them in the context."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= elements)
            self._left -= elements
        try:
            yield
        finally:
            with self._changed:
                self._left += elements
                self._changed.notify_all()
