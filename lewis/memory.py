"""How much memory a process takes, and how much there is. Pages of mapped files do not count."""

from __future__ import annotations

import threading
from pathlib import Path

_INTERVAL = 0.02  # seconds


class PeakMemory:
    """Samples the memory while its block runs.

    Attributes:
        peak: bytes, the most that was seen.
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
    """Resident anonymous memory of a process, 0 if it is gone (or a zombie)."""
    try:
        return _kilobytes(Path(f"/proc/{process}/status"), "RssAnon:")
    except OSError:
        return 0


def available_bytes() -> int:
    """What can be had on this machine without swapping."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _kilobytes(table: Path, row: str) -> int:
    """A row of one of the kernel's tables, in bytes; 0 if it is not there."""
    lines = table.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(row)), 0)
