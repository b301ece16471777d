"""Torch's operations in this thread, and in it alone: without a part for others, whose sums come out differently."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lewis.lazy import torch

_threads, _lock, _own = {"users": 0, "before": 1}, threading.Lock(), threading.local()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations in this thread use no others; blocks may be nested."""
    if getattr(_own, "inside", False):
        yield
        return
    with _lock:
        if _threads["users"] == 0:
            _threads["before"] = torch.get_num_threads()
        _threads["users"] += 1
    torch.set_num_threads(1)
    _own.inside = True
    try:
        yield
    finally:
        _own.inside = False
        with _lock:
            _threads["users"] -= 1
        torch.set_num_threads(_threads["before"])  # threads that begin later take it over
