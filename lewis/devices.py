"""The devices that torch works on, and what they mean for numbers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lewis.errors import InputError
from lewis.lazy_torch import torch

# What the drivers of NVIDIA (also on a Jetson and in WSL) and AMD put into /dev.
_DRIVERS = ("nvidia*", "nvhost*", "dxg", "kfd")
_threads, _lock, _own = {"users": 0, "before": 1}, threading.Lock(), threading.local()


def default_device() -> str:
    """`cuda` if a GPU is there, else `cpu`."""
    return "cuda" if devices() != ["cpu"] else "cpu"


def devices() -> list[str]:
    """All devices of this machine by torch's names: `cuda:0`, `cuda:1` ..., or `cpu` alone."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DRIVERS):
        return ["cpu"]  # without a driver torch sees no GPU, and it takes seconds to load
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]


def merge_device(gpu: str = "cuda") -> str:
    """Where merges compute: `cpu`, or `gpu` if `LEWIS_MERGE_DEVICE` is `cuda`.

    The CPU is the default though a GPU may be there: its compiled loops wait for the disk more than for arithmetic.
    A merge that a GPU makes has a digest of its own: sums, selections and random streams are written to be the same
    there bit by bit, but exponentials, sines and sums over rows are rounded as the device does. No merge was run on a
    GPU by us.

    Raises:
        InputError: if the variable is something else, or no GPU is there.
    """
    given = os.environ.get("LEWIS_MERGE_DEVICE") or "cpu"
    if given not in ("cpu", "cuda"):
        raise InputError(f"LEWIS_MERGE_DEVICE: expected cpu or cuda, got {given!r}; set or unset it")
    if given == "cuda" and default_device() == "cpu":
        raise InputError("LEWIS_MERGE_DEVICE: it is cuda, but torch finds no GPU on this machine; unset it")
    return gpu if given == "cuda" else "cpu"


def precision(device: str) -> str:
    """What a forward pass computes in: fp32 on the CPU, the checkpoint's own dtype elsewhere. Part of every digest.

    It is the same for all GPUs: a result does not depend on which of them (`cuda:0`, `cuda:1`) computed it.
    """
    return "fp32" if device == "cpu" else "stored"


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch single-threaded here: more threads change the order of sums, and so the bytes. Blocks may be nested."""
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
