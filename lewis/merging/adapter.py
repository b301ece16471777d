"""What an adapter holds of a merge, and what error it leaves."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Adapter:
    """What an adapter holds of a merge, for the manifest.

    Attributes:
        ranks: module -> rank.
        whole: modules that are saved whole.
        left_out: tensor that an adapter cannot hold and that moved within the tolerance -> its change, relative to it.
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
        """As plain JSON data."""
        return asdict(self)

    def to_text(self) -> str:
        """One line."""
        low, high = (f(self.ranks.values(), default=0) for f in (min, max))
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        parts = [f"LoRA adapter of {len(self.ranks)} modules, {ranks}"]
        parts += [f"{len(self.whole)} saved whole"] if self.whole else []
        parts += [f"{len(self.left_out)} tensors left as in the base"] if self.left_out else []
        worst = f", at worst {self.worst_error:.2g} in {self.worst}" if self.worst else ""
        return f"{', '.join(parts)}; it leaves a relative error of {self.error:.2g}{worst}"


@dataclass
class Found:
    """What is known of the tensors so far: names of modules, squared Frobenius norms, relative errors."""

    ranks: dict[str, int] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    left_out: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    deltas: dict[str, float] = field(default_factory=dict)
    lefts: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def adapter(self) -> Adapter:
        """All of it, for the manifest."""
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
