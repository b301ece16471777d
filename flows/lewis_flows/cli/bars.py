"""Progress bars on a terminal; elsewhere, a line when each thing begins, and one every ten seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis.progress import Report
from lewis.settings import size_text

if TYPE_CHECKING:
    from lewis.merging.run import Merge, Written


PAUSE = 10.0  # seconds between two lines
SLOW = 0.1  # GB/s


@dataclass(frozen=True)
class Effort:
    """The time and memory that a merge took.

    Attributes:
        seconds: wall time.
        bytes: how many bytes of weights were read and written.
        peak: the most memory that the process had resident, in bytes.
    """

    seconds: float
    bytes: int
    peak: int

    @property
    def rate(self) -> float:
        """GB/s read and written."""
        return self.bytes / 1e9 / self.seconds

    def to_text(self) -> str:
        """Seconds, rate and memory in one line; the rate is left out where the disk does not limit the speed."""
        rate = f", {self.rate:.2f} GB/s read and written" if self.rate >= SLOW else ""
        return f"{self.seconds:.1f} s{rate}, {size_text(self.peak)} of memory at the peak"

    def to_json(self) -> dict[str, float]:
        """As plain JSON data."""
        return {"seconds": self.seconds, "gb_per_second": self.rate, "peak_memory": self.peak}


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a `Report` that draws a bar for each kind of work: the percentage done and the time left."""
    from rich.progress import TextColumn

    with _bars(TextColumn("{task.percentage:>3.0f} %")) as bars:
        known, lines = dict[str, Any](), _Lines(bars)

        def report(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = _begin(bars, what, total)
            bars.update(known[what], completed=done)
            lines.add(what, done, total)

        yield report


def run_merge(prepared: "Merge", *arguments: Any, **named: Any) -> tuple["Written", Effort]:
    """Run a merge with a bar: tensors done, GB/s and the time left. The arguments are those of `Merge.run`."""
    from rich.progress import TextColumn

    from lewis.memory import peak_resident_bytes

    columns = TextColumn("{task.fields[tensors]} tensors"), TextColumn("{task.fields[rate]:.2f} GB/s")
    begun, tensors, traffic = time.perf_counter(), len(prepared.layout), prepared.traffic
    with _bars(*columns) as bars:
        task, merged = _begin(bars, "merge", prepared.steps, tensors=f"0/{tensors}", rate=0.0), 0
        lines = _Lines(bars)

        def report(what: str, done: int, total: int) -> None:
            nonlocal merged
            merged += what != "fit"
            rate = traffic * (done / total if total else 1) / 1e9 / (time.perf_counter() - begun)
            bars.update(task, completed=done, tensors=f"{merged}/{tensors}", rate=rate)
            lines.add("fit" if what == "fit" else "merge", done, total)

        written = prepared.run(*arguments, progress=report, **named)
    return written, Effort(time.perf_counter() - begun, traffic, peak_resident_bytes())


class _Lines:
    """Lines of progress where there is no terminal to draw bars on."""

    def __init__(self, bars: Any) -> None:
        self._off, self._next = bars.console.is_terminal, time.monotonic() + PAUSE

    def add(self, what: str, done: int, total: int) -> None:
        """Write how much is done, if the last line is old enough."""
        if not self._off and time.monotonic() >= self._next:
            self._next = time.monotonic() + PAUSE
            sys.stderr.write(f"{what}: {100 * done / max(total, 1):.0f} %\n")


def _bars(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, before = Console(stderr=True), (TextColumn("{task.description}", markup=False), BarColumn())
    columns = (*before, *columns, TimeRemainingColumn())
    return Progress(*columns, console=console, redirect_stdout=False, disable=not console.is_terminal)


def _begin(bars: Any, what: str, total: int, **fields: Any) -> Any:
    if not bars.console.is_terminal:
        sys.stderr.write(f"{what} ...\n")
    return bars.add_task(what, total=total, **fields)
