"""Progress bars on a terminal; elsewhere, one line when each thing begins."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis.progress import Report

if TYPE_CHECKING:
    from lewis.merging.run import Merge, Written


@dataclass(frozen=True)
class Effort:
    """What a merge took.

    Attributes:
        seconds: wall time.
        bytes: how many bytes of weights were read and written.
        peak: largest anonymous memory, in bytes.
    """

    seconds: float
    bytes: int
    peak: int

    @property
    def rate(self) -> float:
        """GB/s read and written."""
        return self.bytes / 1e9 / self.seconds

    def to_text(self) -> str:
        """One line."""
        return f"{self.seconds:.1f} s, {self.rate:.2f} GB/s read and written, {self.peak / 1e6:.0f} MB peak memory"

    def to_json(self) -> dict[str, float]:
        """As plain JSON data."""
        return {"seconds": self.seconds, "gb_per_second": self.rate, "peak_memory": self.peak}


@contextmanager
def progress() -> Iterator[Report]:
    """Draw a bar for each thing: the percentage done and the time left."""
    from rich.progress import TextColumn

    with _bars(TextColumn("{task.percentage:>3.0f} %")) as bars:
        known: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = _begin(bars, what, total)
            bars.update(known[what], completed=done)

        yield report


def run_merge(prepared: "Merge", *arguments: Any, **named: Any) -> tuple["Written", Effort]:
    """Run a merge with a bar: tensors done, GB/s and the time left. The arguments are those of `Merge.run`."""
    from rich.progress import TextColumn

    from lewis.memory import PeakMemory

    columns = TextColumn("{task.fields[tensors]} tensors"), TextColumn("{task.fields[rate]:.2f} GB/s")
    begun, tensors, elements = time.perf_counter(), len(prepared.layout), prepared.elements
    traffic = prepared.traffic
    with _bars(*columns) as bars, PeakMemory() as memory:
        task, merged = _begin(bars, "merge", elements, tensors=f"0/{tensors}", rate=0.0), 0

        def report(what: str, done: int, total: int) -> None:
            nonlocal merged
            merged += 1
            rate = traffic * (done / total if total else 1) / 1e9 / (time.perf_counter() - begun)
            bars.update(task, completed=done, tensors=f"{merged}/{tensors}", rate=rate)

        written = prepared.run(*arguments, progress=report, **named)
    return written, Effort(time.perf_counter() - begun, traffic, memory.peak)


def _bars(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, before = Console(stderr=True), (TextColumn("{task.description}"), BarColumn())
    columns = (*before, *columns, TimeRemainingColumn())
    return Progress(*columns, console=console, redirect_stdout=False, disable=not console.is_terminal)


def _begin(bars: Any, what: str, total: int, **fields: Any) -> Any:
    if not bars.console.is_terminal:
        sys.stderr.write(f"{what} ...\n")
    return bars.add_task(what, total=total, **fields)
