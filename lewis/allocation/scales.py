"""What the merge takes from the allocation: densities, and the scales that rank the elements of a task vector."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from lewis.lazy_torch import torch

ScalesByTensor = Mapping[str, "torch.Tensor"]
"""Tensor name -> sqrt(mean x^2) per input channel: fp32, broadcasts to the tensor, (in_features,) for an nn.Linear."""

Densities = Mapping[str, float]
"""Tensor name -> fraction of the task vector that is kept, in [0, 1]; names that are left out follow the recipe."""


def fingerprint(scales: ScalesByTensor | None) -> str | None:
    """SHA-256 of the names, shapes and bytes of the scales; None if there are none."""
    if not scales:
        return None
    found = hashlib.sha256()
    for name in sorted(scales):
        found.update(f"{name}\0{list(scales[name].shape)}\0".encode() + scales[name].numpy().tobytes())
    return found.hexdigest()
