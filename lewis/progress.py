"""How long-running work reports its progress: one callback type for the library, the command line and Prefect."""

from collections.abc import Callable
from typing import TypeAlias

Report: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is worked on, units done, units in all). The units are those of the work: elements of a merge,
tokens of a forward pass, requests of an evaluation. It may raise, which ends the work."""


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that shows nothing."""
