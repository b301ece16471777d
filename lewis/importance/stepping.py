"""A forward pass that stops on its way, so that many of them can be led side by side.

Each pass is a greenlet, which can stop anywhere below its first call, in the code of whatever model it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from lewis.importance.batches import Batch

_OF_RUN: WeakKeyDictionary[greenlet, Stepping] = WeakKeyDictionary()


@dataclass(eq=False)
class Stepping:
    """One batch on its way through a model.

    Attributes:
        batch: what goes through.
        forward: runs the model on it.
        place: path of the module that it waits in front of; None at its end.
    """

    batch: Batch
    forward: Callable[[], None]
    place: str | None = None
    _run: greenlet | None = None

    @classmethod
    def current(cls) -> Self | None:
        """The pass that is running; None if none of this class is."""
        found = _OF_RUN.get(getcurrent())
        return found if isinstance(found, cls) else None

    def advance(self) -> Any:
        """Run until the next `wait`, always in the same thread; gives what that was told, None at the end."""
        if self._run is None:
            self._run = greenlet(self.forward)
            _OF_RUN[self._run] = self
        told = self._run.switch()
        return None if self._run.dead else told

    def stop(self) -> None:
        """End what waits here, in its own thread."""
        if self._run is not None and not self._run.dead:
            self._run.throw()


def wait(told: Any) -> None:
    """Stop the pass that is running until it is its turn again, and hand `told` to whoever leads it."""
    getcurrent().parent.switch(told)


def wait_at(path: str, *_: object) -> None:
    """A hook before the module `path`: stop in front of it."""
    wait(path)
