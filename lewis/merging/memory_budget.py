"""How many tensors are merged in torch at a time: by their elements, so that memory follows the largest tensor."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBudget:
    """A number of elements that threads may have in memory together.

    Attributes:
        size: elements.
    """

    def __init__(self, size: int) -> None:
        self.size, self._left, self._changed = size, size, threading.Condition()

    @contextmanager
    def take(self, elements: int) -> Iterator[None]:
        """Wait until so many elements are free, and hold them; at most `size`, or this never returns."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= elements)
            self._left -= elements
        try:
            yield
        finally:
            with self._changed:
                self._left += elements
                self._changed.notify_all()
