"""A fixed set of threads in which torch runs single-threaded, so that results do not depend on their number."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from lewis.devices import one_thread
from lewis.lazy_torch import torch


class Workers:
    """Threads that share out jobs by their place in the list; use as a context.

    A greenlet belongs to the thread that began it: the job at one place always runs in the same thread.
    """

    def __init__(self, threads: int | None = None) -> None:
        """
        Args:
            threads: by default one per core.
        """
        count = threads or len(os.sched_getaffinity(0))
        self._threads = [ThreadPoolExecutor(1) for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def __call__(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run the jobs and wait for all; raises what the first one in their order raised."""
        count = len(self._threads)
        futures = [thread.submit(_run, jobs[i::count]) for i, thread in enumerate(self._threads) if i < len(jobs)]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error


def _run(jobs: Sequence[Callable[[], None]]) -> None:
    with one_thread(), torch.inference_mode():
        for job in jobs:
            job()
