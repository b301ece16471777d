"""What an importance pass leaves in the store: norms as JSON and, in a safetensors file beside it, second moments.

The JSON names size and SHA-256 of the other file, and is written after it: an entry whose moments are gone, cut short
or of another pass is not believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis import store
from lewis.lazy_torch import torch
from lewis.store import kinds

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
    """Where the moments of the entry `path` are."""
    return kinds.IMPORTANCE.beside_of(path)


def write(path: Path, measured: Measured, facts: dict[str, Any]) -> None:
    """Put a measurement into the store, as `path` and the file beside it.

    Args:
        path: of the JSON.
        measured: the numbers.
        facts: what else the JSON holds.
    """
    from safetensors.torch import save

    beside, content = moments_path(path), save(measured.moments)
    with store.written_beside(beside) as scratch:
        scratch.write_bytes(content)
        facts = {**facts, "moments": {"size": len(content), "sha256": store.file_sha256(scratch)}}
    store.write_json(path, {**facts, NORMS: measured.norms})


def is_whole(path: Path) -> bool:
    """Whether the store has the measurement with its moments, as they were written; marks it as used."""
    content, beside = store.read_entry(path), moments_path(path)
    if not isinstance(content, dict) or not content.get(NORMS):
        return False
    expected = content.get("moments") or {}
    try:
        return bool(beside.stat().st_size == expected["size"] and store.file_sha256(beside) == expected["sha256"])
    except (OSError, KeyError, TypeError):
        return False


def read_moments(path: Path) -> dict[str, torch.Tensor]:
    """The second moments of a whole entry."""
    from safetensors.torch import load

    return load(moments_path(path).read_bytes())
