"""Memory that a process uses, and that the machine has free, by /proc; all numbers are 0 where that is missing.

Forecasts and limits count anonymous memory, since pages of mapped files can be dropped at any time. Users are shown
resident memory, mapped libraries included, since a container needs that much.
"""

from __future__ import annotations

import threading
from pathlib import Path

LOADED = 450_000_000  # bytes of a process that has loaded torch and transformers, roughly
_INTERVAL = 0.02  # seconds


class PeakMemory:
    """A context manager that samples the memory of this process while its block runs.

    Attributes:
        peak: the largest sample, in bytes of anonymous memory.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes(process: int | str = "self") -> int:
    """Bytes of resident anonymous memory of a process; 0 if it is gone or a zombie."""
    return _kilobytes(Path(f"/proc/{process}/status"), "RssAnon:")


def mapped_bytes() -> int:
    """Bytes of resident pages of mapped files of this process: mainly the libraries that it has loaded."""
    return _kilobytes(Path("/proc/self/status"), "RssFile:")


def peak_resident_bytes(process: int | str = "self") -> int:
    """The largest resident memory of a process so far, in bytes, by the kernel's count; 0 if it is gone or a zombie."""
    return _kilobytes(Path(f"/proc/{process}/status"), "VmHWM:")


def available_bytes() -> int:
    """Bytes that this machine can still give without swapping."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _kilobytes(table: Path, row: str) -> int:
    """Return a row in kB of a table in /proc as bytes; 0 if there is no such row or table."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(row)), 0)
