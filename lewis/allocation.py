"""Allocation: importance of base and expert -> a density for every tensor (LEWIS, arXiv 2503.03874)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lewis.errors import InputError
from lewis.importance import Layer
from lewis.recipe import Density

SEMANTICS = "1"  # bump when the same inputs would give other densities


@dataclass(frozen=True)
class Allocation:
    """Densities of one expert.

    Attributes:
        densities: tensor name -> density, covered and uncovered.
        mean: parameter-weighted mean density of the covered tensors.
        differences: tensor name -> D(l,c), how far the covered layer moved; empty for `uniform`.
    """

    densities: dict[str, float]
    mean: float
    differences: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


def norm_difference(base: Mapping[str, float], expert: Mapping[str, float]) -> dict[str, float]:
    """LEWIS's D(l,c) = | I_expert(l,c) - I_base(l,c) | per tensor.

    Raises:
        InputError: if the two were not measured on the same layers.
    """
    if base.keys() != expert.keys():
        odd = sorted(base.keys() ^ expert.keys())[0]
        raise InputError(
            f"importance: {odd!r} was measured in one of base and expert only; they differ in architecture"
        )
    return {name: abs(expert[name] - base[name]) for name in base}


def allocate(
    layers: Sequence[Layer], tensors: Sequence[str], policy: Density, differences: Mapping[str, float] | None
) -> Allocation:
    """Give every tensor of one expert its density.

        N(l,c)   = D(l,c) / sum over l' of D(l',c)                               per projection type c
        rho(l,c) = min + (max - min) (N - min N) / (max N - min N)               one global min-max; all equal: midpoint

    Args:
        layers: the covered layers.
        tensors: all tensor names; those that are not covered follow `policy.uncovered`.
        policy: strategy, bounds and budget.
        differences: D(l,c) per tensor; None for `uniform`.

    Returns:
        Densities in [min, max] for covered tensors; with a budget, their weighted mean is exactly that.
    """
    if differences is None:
        level = policy.budget if policy.budget is not None else (policy.min + policy.max) / 2
        densities = {layer.tensor: level for layer in layers}
    else:
        densities = _min_max(layers, policy, differences)
        if policy.budget is not None:
            densities = _meet_budget(layers, policy, densities, policy.budget)
    mean = weighted_mean(layers, densities)
    rest = {"expert": 1.0, "base": 0.0, "mean": mean}[policy.uncovered]
    return Allocation({name: densities.get(name, rest) for name in tensors}, mean, dict(differences or {}))


def uniform_like(layers: Sequence[Layer], allocation: Allocation) -> Allocation:
    """The baseline: the same mean density in every covered tensor, uncovered tensors unchanged."""
    covered = {layer.tensor for layer in layers}
    same = {name: allocation.mean if name in covered else rho for name, rho in allocation.densities.items()}
    return Allocation(same, allocation.mean, {})


def weighted_mean(layers: Sequence[Layer], densities: Mapping[str, float]) -> float:
    """Mean density of the covered tensors, weighted by their parameters."""
    return sum(densities[x.tensor] * x.parameters for x in layers) / sum(x.parameters for x in layers)


def _min_max(layers: Sequence[Layer], policy: Density, differences: Mapping[str, float]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for layer in layers:
        totals[layer.projection] = totals.get(layer.projection, 0.0) + differences[layer.tensor]
    # A projection type that did not move at all has no share to give: N = 0.
    share = {x.tensor: differences[x.tensor] / totals[x.projection] if totals[x.projection] else 0.0 for x in layers}
    low, high = min(share.values()), max(share.values())
    if high - low <= 1e-12 * high:  # equal but for rounding, which must not be stretched over the whole range
        return dict.fromkeys(share, (policy.min + policy.max) / 2)
    scaled = {tensor: (n - low) / (high - low) for tensor, n in share.items()}
    # Weighted this way, 0 and 1 give the bounds exactly; in between, rounding may step over one.
    return {t: min(policy.max, max(policy.min, (1 - x) * policy.min + x * policy.max)) for t, x in scaled.items()}


def _meet_budget(
    layers: Sequence[Layer], policy: Density, densities: Mapping[str, float], budget: float
) -> dict[str, float]:
    """Shift all densities by one number, clip to the bounds; the mean is monotone in it, so bisection finds it."""

    def shifted(by: float) -> dict[str, float]:
        return {tensor: min(policy.max, max(policy.min, rho + by)) for tensor, rho in densities.items()}

    low, high = policy.min - policy.max, policy.max - policy.min
    for _ in range(200):
        middle = (low + high) / 2
        if weighted_mean(layers, shifted(middle)) < budget:
            low = middle
        else:
            high = middle
    return shifted(high)
