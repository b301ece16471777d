"""The contract of a step, on which all code that walks the graph relies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from lewis.progress import Report
from lewis.store.kinds import Kind

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Cost:
    """A rough estimate of the disk space, time and memory that a step takes.

    Attributes:
        written: bytes that it leaves on the disk.
        scratch: bytes that it needs on the disk meanwhile, and removes.
        seconds: wall time on this machine, as busy as it is now; None: not known.
        passes: the part of `seconds` that forward passes for second-order statistics take.
        memory: bytes of anonymous memory at its peak.
    """

    written: int = 0
    scratch: int = 0
    seconds: float | None = 0.0
    passes: float = 0.0
    memory: int = 0


class Step(ABC, Generic[In, Out]):
    """One kind of work: what its result is identified by, where it is found, how it is made, what it costs.

    A step is a row of `lewis.steps.table`. The graph of a recipe (`lewis.steps.graph`) says which steps a merge needs,
    in which order, and gives each its input. Three things walk the graph: `lewis.steps.run` in this process,
    `lewis.steps.plan` without doing the work, and the Prefect flows. They know a step by this contract alone, so a new
    step is one row in the table and one node in the graph.

    **Input.** `In` is a small frozen value: paths, digests, numbers, blocks of a recipe. It holds no tensor, no open
    model and no whole recipe, and it can be pickled, since a task may run on another machine.

    **Result.** `Out` is small and can be pickled, too: a reference to an entry of the store (`lewis.store.reference`),
    which checks its files whenever it is loaded. So a record of a finished step is never believed when its files are
    gone or damaged.

    **Key.** `key` identifies the result: two inputs have the same key exactly if `make` gives the same result for them.
    It covers the content of every file that is read, every parameter that changes a byte, the semantics of the code
    (`SEMANTICS` of the modules), the version of a plug-in, and the number format in which this machine computes, if the
    result depends on it. Nothing else makes a key: Prefect's cache key of a task is this string.

    **Doing it twice.** `make` looks for the entry before it makes it, both under the entry's lock. So two runs that
    want the same result at the same time make it once, and a step that was killed can be run again at any time.

    **Errors.** Every method may raise `InputError`, naming what is wrong with the input, and `TransientError` where a
    server did not answer; only the latter can pass by itself.

    Attributes:
        name: of the step, such as `measure`; a node adds what it is done to.
        kind: of the entries that it makes; None if it leaves no entry in the store.
        cached: whether the result is kept under `key`. That of a check is not: it is made in every run.
        retries: whether its errors can pass by themselves, as those of a download can.
        timeout: seconds after which its task is given up; None: the step has a time limit of its own.
        opens: whether `key` and `cost` read the weights of the models, which must be on this disk then.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind | None] = None
    cached: ClassVar[bool] = True
    retries: ClassVar[bool] = False
    timeout: ClassVar[float | None] = None
    opens: ClassVar[bool] = False

    @abstractmethod
    def key(self, given: In) -> str:
        """Return the identity of the result for an input, safe as the name of a file."""

    @abstractmethod
    def find(self, given: In) -> Out | None:
        """Return the result if it is on this machine or in the remote half of the store, else None."""

    @abstractmethod
    def make(self, given: In, report: Report, device: str) -> Out:
        """Find the result, or make it once.

        Args:
            given: the input.
            report: called with the progress so far.
            device: what torch computes on, if `devices` asks for one: `cpu`, `cuda:0`, or several with commas.
        """

    def devices(self, given: In) -> int:
        """The number of devices of this machine that `make` occupies for an input."""
        return 0

    def cost(self, given: In) -> Cost:
        """Estimate what `make` takes if the result has to be made."""
        return Cost()

    def paths(self, made: Out) -> Sequence[Path]:
        """The entries of the store that a result refers to: by these, a run knows whether they were made or found."""
        return ()

    def facts(self, given: In, made: Out) -> Mapping[str, Any]:
        """Facts to show next to the result, as plain JSON data."""
        return {}
