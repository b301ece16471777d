"""The result of an importance pass in the store: norms as JSON and, in a safetensors file next to it, second moments.

The JSON names size and SHA-256 of the other file, and is written after it: so an entry whose moments are missing,
damaged or from another pass is noticed, and not used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import LewisError
from lewis.lazy_torch import torch
from lewis.store import kinds
from lewis.store.manifest import remembered_sha256

NORMS = "norms"


@dataclass(frozen=True)
class Measured:
    """What one pass of one model over one calibration set measured.

    Attributes:
        norms: key of a layer -> I(l,c); None if no token reached it.
        moments: tensor name -> s, the mean of x_j^2 over the tokens: fp32, of a shape that broadcasts to the tensor's,
            (in_features,) for a linear layer.
    """

    norms: dict[str, float | None]
    moments: dict[str, torch.Tensor]


def moments_path(path: Path) -> Path:
    """Path of the file with the second moments of the entry `path`."""
    return kinds.IMPORTANCE.beside_of(path)


def write(path: Path, measured: Measured, facts: dict[str, Any]) -> None:
    """Put a measurement into the store, as `path` and the file next to it."""
    from safetensors.torch import save

    file, content = moments_path(path), save(measured.moments)
    with store.written_beside(file) as scratch:
        scratch.write_bytes(content)
        facts = {**facts, "moments": {"size": len(content), "sha256": store.file_sha256(scratch)}}
    store.write_entry(path, {**facts, NORMS: measured.norms})


def is_whole(path: Path) -> bool:
    """Whether the store has the measurement with its moments, as they were written; marks it as used.

    Damaged files are set aside.
    """
    content, file = store.read_entry(path), moments_path(path)
    if content is None or not content.get(NORMS):
        return False
    expected = content.get("moments") or {}
    try:
        if file.stat().st_size == expected["size"] and remembered_sha256(file) == expected["sha256"]:
            return True
    except (OSError, KeyError, TypeError):
        return False
    store.set_aside([path, file], f"{file.name}: its size or SHA-256 is not what the entry says")
    return False


def read_moments(path: Path) -> dict[str, torch.Tensor]:
    """Read the second moments of an entry.

    Raises:
        LewisError: if the file is gone or damaged.
    """
    from safetensors.torch import load

    try:
        content = moments_path(path).read_bytes()
    except OSError as error:
        raise LewisError(f"{moments_path(path)}: {error.strerror}; run again to measure it") from error
    if hashlib.sha256(content).hexdigest() != (store.entry(path, "moments") or {}).get("sha256"):
        raise LewisError(f"{moments_path(path)} is damaged; run again to measure it")
    return load(content)
