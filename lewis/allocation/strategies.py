"""How evidence about the layers becomes densities: one pure function per allocator, before the budget is met.

Each takes the layers, the evidence (key of a layer -> number) and the bounds, and gives key -> density in [min, max].
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lewis.models.network.module_tree import Layer
from lewis.recipe.schema import Density

Evidence = Mapping[str, float]
Allocator = Callable[[Sequence[Layer], Evidence, Density], dict[str, float]]


def lewis(layers: Sequence[Layer], differences: Evidence, policy: Density) -> dict[str, float]:
    """LEWIS (arXiv 2503.03874): the share of its projection's movement, brought to the bounds.

        N(l,c)   = D(l,c) / sum over l' of D(l',c)                               per projection type c
        rho(l,c) = min + (max - min) (N - min N) / (max N - min N)               one global min-max; all equal: midpoint

    With `scale: rank`, N is replaced by its rank among all layers (equal values share the mean of their ranks). With
    `robust`, values beyond the 5th and the 95th percentile are clipped to it. Under min-max alone one outlier takes
    `max` and leaves the others near `min`. With `decimals`, N is rounded first, as in the authors' code.
    """
    totals: dict[str, float] = {}
    for layer in layers:
        totals[layer.projection] = totals.get(layer.projection, 0.0) + differences[layer.key]
    # A projection type that did not move at all has no share to give: N = 0.
    share = {x.key: differences[x.key] / totals[x.projection] if totals[x.projection] else 0.0 for x in layers}
    if policy.decimals is not None:
        share = {key: round(n, policy.decimals) for key, n in share.items()}
    values = np.array(list(share.values()))
    if policy.scale == "rank" and not _all_equal(values):
        ordered = np.sort(values)
        values = (np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right") - 1) / 2
    elif policy.scale == "robust":
        values = values.clip(*np.percentile(values, [5, 95]))
    return dict(zip(share, _to_bounds(values, policy.min, policy.max), strict=True))


def owl(layers: Sequence[Layer], outliers: Evidence, policy: Density) -> dict[str, float]:
    """OWL (arXiv 2310.05175): blocks with a larger share of outliers keep more; all layers of a block keep the same.

        r_l = 2 lambda (o_l - min o) / (max o - min o);   rho_l = target + r_l - mean r

    lambda is as large as the bounds let it be on both sides of the target (the budget, or the middle of the bounds).
    """
    return _around_target(layers, _by_block(layers, outliers), policy)


def dlp(layers: Sequence[Layer], medians: Evidence, policy: Density) -> dict[str, float]:
    """DLP (arXiv 2505.23807): blocks with a smaller median score keep more: as `owl`, of 1 - m_l / sum m."""
    medians_of = _by_block(layers, medians)
    total = sum(medians_of.values())
    return _around_target(layers, {block: 1 - m / total if total else 0.0 for block, m in medians_of.items()}, policy)


def depth_gradient(layers: Sequence[Layer], evidence: Evidence, policy: Density) -> dict[str, float]:
    """An arithmetic progression over the depth, from `max` in the first block to `min` in the last one (as ATP,
    arXiv 2502.14770); needs no evidence."""
    last = max(layer.index for layer in layers)
    return {x.key: policy.max - (policy.max - policy.min) * (x.index / last if last else 0.5) for x in layers}


def given(layers: Sequence[Layer], shares: Evidence, policy: Density) -> dict[str, float]:
    """`global`: the evidence is the density already (`lewis.allocation.global_threshold`)."""
    return {layer.key: shares[layer.key] for layer in layers}


def target_of(policy: Density) -> float:
    """The mean density that allocators which preserve it aim at: the budget, or the middle of the bounds."""
    return policy.budget if policy.budget is not None else (policy.min + policy.max) / 2


def _around_target(layers: Sequence[Layer], values: Mapping[str, float], policy: Density) -> dict[str, float]:
    target = target_of(policy)
    reach = 2 * min(target - policy.min, policy.max - target)
    spread = np.array(_to_bounds(np.array(list(values.values())), 0.0, reach))
    density = dict(zip(values, (target + spread - spread.mean()).clip(policy.min, policy.max).tolist(), strict=True))
    return {layer.key: density[_block(layer)] for layer in layers}


def _by_block(layers: Sequence[Layer], evidence: Evidence) -> dict[str, float]:
    """The mean of the evidence in each block, weighted by parameters."""
    sums: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for layer in layers:
        block = _block(layer)
        sums[block] = sums.get(block, 0.0) + evidence[layer.key] * layer.parameters
        sizes[block] = sizes.get(block, 0) + layer.parameters
    return {block: total / sizes[block] for block, total in sums.items()}


def _block(layer: Layer) -> str:
    return layer.tensor.partition(f".{layer.index}.")[0] + f".{layer.index}"


def _all_equal(values: np.ndarray) -> bool:
    """Whether the values differ by rounding errors only, which must not be stretched over the whole range."""
    return bool(values.max() - values.min() <= 1e-12 * values.max())


def _to_bounds(values: np.ndarray, low: float, high: float) -> list[float]:
    """Min-max to [low, high]; all equal gives the middle."""
    if _all_equal(values):
        return [(low + high) / 2] * len(values)
    x = (values - values.min()) / (values.max() - values.min())
    # Weighted this way, 0 and 1 give the bounds exactly; in between, rounding may step over one.
    return ((1 - x) * low + x * high).clip(low, high).tolist()


ALLOCATORS: dict[str, Allocator] = {
    "lewis": lewis,
    "owl": owl,
    "dlp": dlp,
    "depth_gradient": depth_gradient,
    "global": given,
}
