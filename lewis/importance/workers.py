"""A fixed set of threads in which torch runs single-threaded, so that results do not depend on their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from threading import Event, Lock
from typing import TypeVar

from lewis.devices import one_thread
from lewis.lazy_torch import torch
from lewis.threads import cores

T = TypeVar("T")


class Workers:
    """Threads that share out jobs; use as a context.

    A greenlet can run only in the thread that began it: jobs that resume greenlets use `in_place`.

    Attributes:
        count: how many threads.
    """

    def __init__(self, threads: int | None = None) -> None:
        """
        Args:
            threads: by default one per core.
        """
        self.count = threads or cores()
        self._threads = [ThreadPoolExecutor(1) for _ in range(self.count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def __call__(self, jobs: Sequence[Callable[[], T]], /) -> list[T]:
        """Run the jobs, each in whichever thread is free; return their results in order.

        Raises:
            Exception: what a job raised, once the other threads have finished the jobs that they run; no other begins.
        """
        found = dict[int, T]()

        def run(i: int) -> None:
            found[i] = jobs[i]()

        waiting = iter([partial(run, i) for i in range(len(jobs))])
        self._in_all([waiting] * min(len(self._threads), len(jobs)))
        return [found[i] for i in range(len(jobs))]

    def in_place(self, jobs: Sequence[Callable[[], None]], others: Sequence[Callable[[], None]] = ()) -> None:
        """Run the jobs, job i of every call in the same thread, and wait for all; raise as `__call__` does.

        Args:
            jobs: the jobs of the threads, in a fixed order.
            others: jobs that a thread takes when it has finished its own.
        """
        shared = iter(others)
        self._in_all([chain(jobs[i :: self.count], shared) for i in range(self.count)])

    def _in_all(self, shares: Sequence[Iterator[Callable[[], None]]]) -> None:
        taking, failed = Lock(), Event()
        threads = zip(self._threads, shares, strict=False)
        futures = [thread.submit(_run, share, taking, failed) for thread, share in threads]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error


def _run(jobs: Iterator[Callable[[], None]], taking: Lock, failed: Event) -> None:
    with one_thread(), torch.inference_mode():
        while not failed.is_set():
            with taking:
                job = next(jobs, None)
            if job is None:
                return
            try:
                job()
            except BaseException:
                failed.set()
                raise
