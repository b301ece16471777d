"""The device that torch works on, and what it means for numbers."""


def default_device() -> str:
    """`cuda` if a GPU is there, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(device: str) -> str:
    """What a forward pass computes in: fp32 on the CPU, the checkpoint's own dtype elsewhere. Part of every digest."""
    return "fp32" if device == "cpu" else "stored"
