"""Turn evidence about how far an expert's layers moved from the base into a density for every tensor."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lewis.allocators import ALLOCATORS, Allocator, target_of
from lewis.lazy_torch import torch
from lewis.models.network.module_tree import Layer
from lewis.recipe.schema import Density

SEMANTICS = "5"  # bump when the same inputs would give other densities
NEAR_UNIFORM = 0.02  # an allocation closer to uniform than this has no effect: a warning
ROUNDING = 1e-9  # how far a density that another package's allocator gives may lie beyond a bound

ScalesByTensor = Mapping[str, "torch.Tensor"]
"""Tensor name -> sqrt(mean x^2) per input channel: fp32, broadcasts to the tensor, (in_features,) for an nn.Linear."""

Densities = Mapping[str, float]
"""Tensor name -> fraction of the task vector that is kept, in [0, 1]; names that are left out follow the recipe."""


@dataclass(frozen=True)
class Allocation:
    """Densities of one expert.

    Attributes:
        densities: tensor name -> density, covered and uncovered.
        mean: parameter-weighted mean density of the covered tensors.
        differences: key of a layer -> D(l,c), how far it moved, or the allocator's other evidence; if the allocator
            needs none, 1 for each layer that a token reached; empty if nothing was measured.
    """

    densities: dict[str, float]
    mean: float
    differences: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


def allocate(
    layers: Sequence[Layer], tensors: Sequence[str], policy: Density, differences: Mapping[str, float | None] | None
) -> Allocation:
    """Give every tensor of one expert its density.

    A tensor of several parts (a fused q, k and v) gets the mean of its parts', weighted by their parameters.

    Args:
        layers: the covered layers.
        tensors: all tensor names; those that are not covered follow `policy.uncovered`.
        policy: strategy, bounds and budget.
        differences: key of a layer -> evidence, None for a layer that no token reached: it counts as not covered. None
            in all if nothing was measured.

    Returns:
        Densities in [min, max] for covered tensors; with a budget, their weighted mean is exactly that.

    Raises:
        LewisError: naming the package whose allocator fails, or gives a layer no density within the bounds.
    """
    known = differences or {}
    reached = [layer for layer in layers if differences is None or known.get(layer.key) is not None]
    evidence = {layer.key: value for layer in reached if (value := known.get(layer.key)) is not None}
    allocator = ALLOCATORS.find(policy.strategy)
    of_layers = _of_layers(allocator, reached, evidence, policy) if reached else {}
    budget = target_of(policy) if allocator.keeps_mean else policy.budget
    if reached and budget is not None and allocator.guides and not allocator.whole_elements:
        of_layers = _meet_budget(reached, policy, of_layers, budget)
    densities = _of_tensors(reached, of_layers)
    if allocator.whole_elements:
        sizes = Counter[str]()
        for layer in reached:
            sizes[layer.tensor] += layer.parameters
        densities = {tensor: min(policy.max, _keeping(rho, sizes[tensor])) for tensor, rho in densities.items()}
    mean = weighted_mean(reached, densities) if reached else target_of(policy)
    rest = {"expert": 1.0, "base": 0.0, "mean": mean}[policy.uncovered]
    return Allocation({name: densities.get(name, rest) for name in tensors}, mean, evidence)


def covered_by(layers: Sequence[Layer], allocation: Allocation) -> list[Layer]:
    """The layers that an allocation gave a density of their own."""
    return [layer for layer in layers if not allocation.differences or layer.key in allocation.differences]


def uniform_like(layers: Sequence[Layer], allocation: Allocation) -> Allocation:
    """The baseline: the same mean density in every covered tensor, uncovered tensors unchanged."""
    covered = {layer.tensor for layer in covered_by(layers, allocation)}
    same = {name: allocation.mean if name in covered else rho for name, rho in allocation.densities.items()}
    return Allocation(same, allocation.mean, {})


def weighted_mean(layers: Sequence[Layer], densities: Mapping[str, float]) -> float:
    """Mean density of the covered tensors, weighted by their parameters."""
    return sum(densities[x.tensor] * x.parameters for x in layers) / sum(x.parameters for x in layers)


def distance_to_uniform(layers: Sequence[Layer], allocation: Allocation) -> float:
    """The share of kept weights that lies elsewhere than in the uniform allocation of the same mean: 0 is uniform."""
    covered = covered_by(layers, allocation)
    moved = sum(abs(allocation.densities[x.tensor] - allocation.mean) * x.parameters for x in covered)
    kept = allocation.mean * sum(x.parameters for x in covered)
    return moved / (2 * kept) if kept else 0.0


def fingerprint(scales: ScalesByTensor | None) -> str | None:
    """SHA-256 of the names, shapes and bytes of the scales; None if there are none."""
    if not scales:
        return None
    found = hashlib.sha256()
    for name in sorted(scales):
        found.update(f"{name}\0{list(scales[name].shape)}\0".encode() + scales[name].numpy().tobytes())
    return found.hexdigest()


def _of_layers(
    allocator: Allocator, layers: Sequence[Layer], evidence: Mapping[str, float], policy: Density
) -> dict[str, float]:
    with allocator.blamed("lewis.density.strategy"):
        found = allocator(layers, evidence, policy)
        if not allocator.origin:
            return found
        low, high = (policy.min, policy.max) if allocator.guides else (0.0, 1.0)
        for layer in layers:
            rho = found.get(layer.key)
            if rho is None or not low - ROUNDING <= rho <= high + ROUNDING:
                raise ValueError(f"{layer.key}: expected a density from {low:g} to {high:g}, got {rho}")
            found[layer.key] = min(high, max(low, float(rho)))
        return found


def _of_tensors(layers: Sequence[Layer], of_layers: Mapping[str, float]) -> dict[str, float]:
    sums: dict[str, list[tuple[float, int]]] = {}
    for layer in layers:
        sums.setdefault(layer.tensor, []).append((of_layers[layer.key], layer.parameters))
    return {
        tensor: parts[0][0] if len(parts) == 1 else sum(rho * n for rho, n in parts) / sum(n for _, n in parts)
        for tensor, parts in sums.items()
    }


def _keeping(density: float, size: int) -> float:
    """Raise a density of whole elements by rounding errors, until `int(density * size)` is their number."""
    count = round(density * size)
    while abs(density * size - count) < 1e-6 and int(density * size) < count:
        density = math.nextafter(density, 1.0)
    return density


def _meet_budget(
    layers: Sequence[Layer], policy: Density, densities: Mapping[str, float], budget: float
) -> dict[str, float]:
    """Shift all densities by one number, clip to the bounds; the mean is monotone in it, so bisection finds it."""
    size = sum(layer.parameters for layer in layers)

    def shifted(by: float) -> dict[str, float]:
        return {key: min(policy.max, max(policy.min, rho + by)) for key, rho in densities.items()}

    low, high = policy.min - policy.max, policy.max - policy.min
    for _ in range(200):
        middle = (low + high) / 2
        moved = shifted(middle)
        if sum(moved[layer.key] * layer.parameters for layer in layers) / size < budget:
            low = middle
        else:
            high = middle
    return shifted(high)
