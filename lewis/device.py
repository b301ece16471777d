"""The devices that torch works on, and what they mean for numbers."""

import sys
from pathlib import Path

# What the drivers of NVIDIA (also on a Jetson and in WSL) and AMD put into /dev.
_DRIVERS = ("nvidia*", "nvhost*", "dxg", "kfd")


def default_device() -> str:
    """`cuda` if a GPU is there, else `cpu`."""
    return "cuda" if devices() != ["cpu"] else "cpu"


def devices() -> list[str]:
    """All devices of this machine by torch's names: `cuda:0`, `cuda:1` ..., or `cpu` alone."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DRIVERS):
        return ["cpu"]  # without a driver torch sees no GPU, and it takes seconds to load
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]


def precision(device: str) -> str:
    """What a forward pass computes in: fp32 on the CPU, the checkpoint's own dtype elsewhere. Part of every digest.

    It is the same for all GPUs: a result does not depend on which of them (`cuda:0`, `cuda:1`) computed it.
    """
    return "fp32" if device == "cpu" else "stored"
