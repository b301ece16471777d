"""Which device torch computes on, and how that choice changes the numbers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lewis import settings
from lewis.errors import InputError
from lewis.lazy_torch import torch

# Device files of the GPU drivers: NVIDIA (also on a Jetson and in WSL) and AMD.
_DRIVERS = ("nvidia*", "nvhost*", "dxg", "kfd")
_threads, _lock, _own = {"users": 0, "before": 1}, threading.Lock(), threading.local()


def default_device() -> str:
    """`cuda` if this machine has a GPU, else `cpu`."""
    return "cuda" if devices() != ["cpu"] else "cpu"


def devices() -> list[str]:
    """All devices of this machine by torch's names: `cuda:0`, `cuda:1` ..., or `cpu` alone."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DRIVERS):
        return ["cpu"]  # without a driver torch finds no GPU, so torch, which takes seconds to load, is not imported
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]


def merge_device(gpu: str = "cuda") -> str:
    """Return the device on which merges compute: `cpu`, or `gpu` if `LEWIS_MERGE_DEVICE` is `cuda`.

    The CPU is the default even if there is a GPU: its compiled loops mostly wait for the disk, not for arithmetic.
    A merge on a GPU has another digest than one on the CPU: sums, selections and random streams are written to give the
    same bits on both, but each device rounds exponentials, sines and sums over rows in its own way. No merge has been
    run on a GPU.

    Args:
        gpu: the GPU to name, as torch does (`cuda:1`).

    Raises:
        InputError: if the variable has another value, or this machine has no GPU.
    """
    given = settings.MERGE_DEVICE.get()
    if given == "cuda" and default_device() == "cpu":
        raise InputError("LEWIS_MERGE_DEVICE: it is cuda, but torch finds no GPU on this machine; unset it")
    return gpu if given == "cuda" else "cpu"


def precision(device: str) -> str:
    """The precision of a forward pass: `fp32` on the CPU, `stored` (the checkpoint's dtype) elsewhere.

    It is a part of every digest that depends on a forward pass. All GPUs (`cuda:0`, `cuda:1`) give the same answer, so
    that a digest does not depend on which of them computed the result.
    """
    return "fp32" if device == "cpu" else "stored"


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch single-threaded in a block, since threads change the order of sums, and so bytes; blocks may nest."""
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
            torch.set_num_threads(_threads["before"])  # torch also gives this number to threads that start later
