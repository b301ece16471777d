"""Peak anonymous memory of this process: what a machine must have. Pages of mapped files are not in it."""

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
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
