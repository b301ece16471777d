"""`global`: one threshold over all covered tensors, found from histograms of the bits of fp32 numbers.

**What it minimises.** Let y = W x be a layer's output, and let pruning keep a subset K of the task vector's elements.
What is left out of the output is sum over (i,j) not in K of delta_ij x_j. With inputs taken as uncorrelated, its mean
square, summed over outputs and layers, is

    E(K) = sum over (i,j) not in K of delta_ij^2 s_j,      s_j the mean of x_j^2,

a sum of one cost per element that does not depend on the others. Among all K with |K| = k, E is least if and only if K
holds k elements of the largest cost: were a cost a in K less than a cost b outside, swapping the two would lower E by
b - a > 0; and if there is no such pair, the sum over K is largest, so E is least. The elements of the largest cost are
those of the largest score |delta_ij| sqrt(s_j), since squaring keeps the order of non-negative numbers; so E is least
for one threshold t on the scores of all tensors together, ties at t broken in any way. A tensor's density is its share
above t, and `prune_by: activation` keeps exactly those elements, for it ranks by the same score within the tensor. With
bounds, the same argument holds among the tensors that are at no bound: t is solved with the others' counts fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from lewis.allocation.evidence import by_layer, task_vector
from lewis.lazy_torch import torch
from lewis.models.model import Model
from lewis.models.network.module_tree import Covered

_COARSE, _FINE = 1 << 15, 1 << 16  # non-negative fp32 numbers have 31 bits, which sort like them as whole numbers


def shares(
    base: Model,
    expert: Model,
    covered: Sequence[Covered],
    moments: Mapping[str, torch.Tensor],
    *,
    target: float,
    low: float,
    high: float,
) -> dict[str, float | None]:
    """The density of each layer under one threshold on |delta| sqrt(s) over all of them.

    Args:
        base, expert: opened.
        covered: the covered tensors.
        moments: s of the expert per tensor.
        target: mean density, weighted by parameters, which is met exactly.
        low, high: bounds of each density.

    Returns:
        Key of a layer -> density; None where no token reached it.
    """
    reached = [each for each in covered if each.tensor in moments]
    layers = [layer for each in reached for layer in each.layers]
    sizes = np.array([layer.parameters for layer in layers])
    wanted = target * float(sizes.sum())

    def scores() -> Iterator[np.ndarray]:
        for each in reached:
            delta = task_vector(base, expert, each.tensor).abs_() * moments[each.tensor].sqrt()
            yield from by_layer(delta, each)

    def kept(above: np.ndarray) -> np.ndarray:
        return above.clip(low * sizes, high * sizes)

    above = _above((b >> 16 for b in map(_bits, scores())), sizes, _COARSE)
    bin_ = _last_reaching(above, kept, wanted)
    above = above[:, bin_ + 1].copy()  # of a mixture of many experts, all bins take gigabytes
    exact = _above((b[b >> 16 == bin_] & (_FINE - 1) for b in map(_bits, scores())), sizes, _FINE)
    exact += above[:, None]
    place = _last_reaching(exact, kept, wanted)
    # Scores equal to the threshold are ties: each layer keeps its share of the elements that are still missing.
    under, over = kept(exact[:, place + 1]), kept(exact[:, place])
    missing, room = wanted - under.sum(), over - under
    counts = under + (room * (missing / room.sum()) if room.sum() > 0 else 0)
    found: dict[str, float | None] = dict.fromkeys((layer.key for each in covered for layer in each.layers), None)
    return found | {layer.key: float(c / n) for layer, c, n in zip(layers, counts, sizes, strict=True)}


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.int32)


def _above(rows: Iterable[np.ndarray], sizes: np.ndarray, bins: int) -> np.ndarray:
    """How many of each row lie in a bin or above it, and 0 after the last bin; shape (rows, bins + 1)."""
    found = np.zeros((len(sizes), bins + 1), np.min_scalar_type(sizes.max()))
    for above, row in zip(found, rows, strict=True):
        above[:-1] = np.bincount(row, minlength=bins)[::-1].cumsum()[::-1]
    return found


def _last_reaching(above: np.ndarray, kept: Callable[[np.ndarray], np.ndarray], wanted: float) -> int:
    """The highest bin such that it and all bins above it keep at least `wanted` elements; 0 if there is none."""
    low, high = 0, above.shape[1] - 2
    while low < high:
        middle = (low + high + 1) // 2
        if kept(above[:, middle]).sum() >= wanted:
            low = middle
        else:
            high = middle - 1
    return low
