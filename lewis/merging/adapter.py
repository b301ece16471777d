"""The contents of a LoRA adapter of a merge: the best low-rank factors of each delta, and the error they leave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lewis.lazy_torch import torch
from lewis.models.names import PER_TOKEN


@dataclass(frozen=True)
class Adapter:
    """What an adapter holds of a merge, for the manifest.

    Attributes:
        ranks: module -> rank.
        whole: modules that are saved whole.
        left_out: tensor that an adapter cannot hold, changed within the tolerance -> its change relative to its norm.
        error: Frobenius norm of what the adapter leaves out of the merged delta, relative to that of the delta, over
            all merged tensors.
        worst: the module with the largest relative error; empty if none has a low rank.
        worst_error: that error.
    """

    ranks: dict[str, int]
    whole: list[str]
    left_out: dict[str, float]
    error: float
    worst: str
    worst_error: float

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON data."""
        return asdict(self)

    def to_text(self) -> str:
        """What the adapter holds and what error it leaves, in one line."""
        low, high = (f(self.ranks.values(), default=0) for f in (min, max))
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        parts = [f"LoRA adapter of {len(self.ranks)} modules, {ranks}"]
        parts += [f"{len(self.whole)} saved whole"] if self.whole else []
        parts += [f"{len(self.left_out)} tensors left as in the base"] if self.left_out else []
        worst = f", at worst {self.worst_error:.2g} in {self.worst}" if self.worst else ""
        return f"{', '.join(parts)}; it leaves a relative error of {self.error:.2g}{worst}"


@dataclass
class Found:
    """Results for the tensors so far.

    Attributes:
        ranks, whole, left_out: as in `Adapter`.
        errors: module -> relative error.
        deltas, lefts: tensor -> squared Frobenius norms of its merged delta, and of what the adapter leaves out of it.
        shapes: key in the adapter's file -> shape of the factor.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    left_out: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    deltas: dict[str, float] = field(default_factory=dict)
    lefts: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def adapter(self) -> Adapter:
        """Summarise the results of all tensors, for the manifest."""
        # Summed in the order of names: threads finish in any order.
        left, norm = (sum(each[name] for name in sorted(each)) for each in (self.lefts, self.deltas))
        worst = max(sorted(self.errors), key=lambda name: self.errors[name], default="")
        return Adapter(
            ranks=dict(sorted(self.ranks.items())),
            whole=sorted(self.whole),
            left_out=dict(sorted(self.left_out.items())),
            error=math.sqrt(left / norm),
            worst=worst,
            worst_error=self.errors.get(worst, 0.0),
        )


@dataclass(frozen=True)
class Factors:
    """A delta of shape (out, in) as `b @ a`, and what that leaves out.

    Attributes:
        a: fp32 (rank, in); its rows have length 1.
        b: fp32 (out, rank); the lengths of its columns are the singular values.
        left: Frobenius norm of `delta - b @ a`, rounding of the factors included.
        norm: Frobenius norm of the delta.
    """

    a: torch.Tensor
    b: torch.Tensor
    left: float
    norm: float


def sides(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    """The smaller and the larger side of each tensor that an adapter holds as factors, as far as shapes show."""
    found = [shape for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(PER_TOKEN)]
    return [(min(shape), max(shape)) for shape in found]


def factor_bytes(shapes: Mapping[str, tuple[int, ...]], rank: int | None) -> int:
    """The most bytes that an adapter's factors take, as far as shapes show; without modules that it saves whole.

    Args:
        shapes: tensor -> shape, of the tensors that are merged.
        rank: the largest rank; None: no limit.
    """
    return sum(4 * min(rank or small, small) * (small + large) for small, large in sides(shapes))


def factorise(delta: torch.Tensor, rank: int | None, tolerance: float | None) -> Factors:
    """Truncate the singular value decomposition of a delta (Eckart and Young: no factors of this rank are closer).

    The singular vectors of the smaller side are the eigenvectors of its Gram matrix, in fp64: singular values down to
    1e-8 of the largest come out, less than what fp32 weights resolve. Call it single-threaded for the same bytes on
    every number of threads.

    Args:
        delta: fp32 (out, in), not all 0.
        rank: the largest rank; None: no limit.
        tolerance: the smallest rank is taken whose `left` is at most this share of `norm`; None: `rank`.
    """
    exact = delta.double()
    outputs, inputs = exact.shape
    tall = outputs >= inputs
    values, vectors = torch.linalg.eigh(exact.T @ exact if tall else exact @ exact.T)  # ascending
    values, vectors = values.clamp_(min=0).flip(0), vectors.flip(1)
    kept = min(rank or len(values), len(values))
    if tolerance is not None:
        left = values.flip(0).cumsum(0).flip(0)  # left[k]: the squared error of rank k
        within = int((left > tolerance**2 * values.sum()).sum())
        kept = min(kept, max(within, 1))
    vectors = vectors[:, :kept]
    # An eigenvector has no sign of its own: its largest element is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    if tall:
        a, b = vectors.T, exact @ vectors
    else:
        a = vectors.T @ exact
        lengths = a.norm(dim=1, keepdim=True)
        a, b = a / torch.where(lengths > 0, lengths, 1.0), vectors * lengths.T
    a, b = a.float().contiguous(), b.float().contiguous()
    norm = float(exact.norm())
    return Factors(a, b, float(exact.addmm_(b.double(), a.double(), alpha=-1).norm()), norm)
