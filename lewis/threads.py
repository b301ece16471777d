"""How many threads to start, and a pool of threads that share the context variables of their submitter."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any


def cores() -> int:
    """Return how many cores this process may use; on systems that do not report it (macOS), all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ContextPool(ThreadPoolExecutor):
    """A `ThreadPoolExecutor` whose calls run in a copy of the context variables of the thread that submits them.

    Prefect keeps in such a variable the run to which a log message belongs.
    """

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Submit a call as `ThreadPoolExecutor.submit` does; `map` uses this method too."""
        return super().submit(copy_context().run, call, *arguments, **named)
