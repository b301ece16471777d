"""How many tensors are merged in torch at a time: by their elements, so that memory follows the largest one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """Room for `size` elements, shared by threads."""

    def __init__(self, size: int) -> None:
        self.size, self._left, self._changed = size, size, threading.Condition()

    @contextmanager
    def take(self, elements: int) -> Iterator[None]:
        """Wait until there is room for these, and hold it; no more than there is in all."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= elements)
            self._left -= elements
        try:
            yield
        finally:
            with self._changed:
                self._left += elements
                self._changed.notify_all()
