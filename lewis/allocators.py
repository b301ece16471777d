"""Allocators: functions that compute the densities of layers from evidence about them, with what each function needs.

A function takes the layers, the evidence (`Layer.key` -> number) and the bounds, and returns `Layer.key` -> density.
The budget is met afterwards (`lewis.allocation.densities`). Allocators of other packages are found by their entry
points, of the group `lewis.allocators` (`lewis.plugins`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from lewis.plugins import Row, Table

Evidence = Mapping[str, float]
"""`Layer.key` -> number, for each layer that calibration tokens reached; empty if nothing was measured."""

Function = Callable[[Sequence["Layer"], Evidence, "Policy"], Mapping[str, float]]
Needs = Literal["nothing", "metric", "norm_difference", "delta_norm", "outlier", "median", "threshold"]


class Layer(Protocol):
    """The properties of a layer that an allocator gets; `lewis.models.network.module_tree.Layer` has them.

    Attributes:
        key: name of the layer: that of its tensor in the base, and the part of a fused tensor in brackets.
        tensor: name of its tensor.
        index: number of its block, from 0.
        projection: type of the layer (`self_attn.q_proj`).
        parameters: number of its weights.
    """

    @property
    def key(self) -> str: ...
    @property
    def tensor(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def projection(self) -> str: ...
    @property
    def parameters(self) -> int: ...


class Policy(Protocol):
    """The keys of `lewis.density` that an allocator may use; `lewis.recipe.schema.Density` has them.

    Attributes:
        min, max: bounds of every density: 0 < min <= max <= 1.
        budget: the mean density, weighted by parameters; None if the recipe gives none.
        scale, decimals: how `lewis` maps its shares to the bounds.
    """

    @property
    def min(self) -> float: ...
    @property
    def max(self) -> float: ...
    @property
    def budget(self) -> float | None: ...
    @property
    def scale(self) -> str: ...
    @property
    def decimals(self) -> int | None: ...


@dataclass(frozen=True)
class Allocator(Row):
    """A registered allocator; calling it calls the function.

    Attributes:
        evidence: the kind of numbers that the function gets.
            `nothing`: it needs none, so no model is run for it.
            `norm_difference`: the difference of the norms of W sqrt(s) of expert and base. The base is measured, too.
            `delta_norm`, `outlier`, `median`: that measure of the task vector, weighted by the expert's activations
            (`lewis.allocation.evidence.of_task_vector`).
            `threshold`: the share of the layer's elements above one threshold over all layers, for a mean of
            `target_of(policy)` (`lewis.allocation.global_threshold`).
            `metric`: the kind that the recipe's `lewis.importance.metric` names, one of the first three of these.
        keeps_mean: whether its densities lie around `target_of(policy)`. They are then adjusted to exactly this mean;
            the densities of other allocators only to a budget, if there is one.
        whole_elements: whether its densities are shares of whole elements, which are not adjusted.
        guides: whether layers can have different densities. Otherwise densities are not adjusted, default bounds do not
            apply, no baseline is compared with the merge, and nothing warns that densities are even.
        uses: which of the keys `scale` and `decimals` it uses; a recipe that sets others is refused.
    """

    noun = "allocator"
    evidence: Needs = "nothing"
    keeps_mean: bool = False
    whole_elements: bool = False
    guides: bool = True
    uses: tuple[str, ...] = ()

    def __call__(self, layers: Sequence[Layer], evidence: Evidence, policy: Policy) -> dict[str, float]:
        return dict(self.function(list(layers), dict(evidence), policy))  # copies: a plug-in may change them

    def evidence_by(self, metric: str) -> str:
        """Return the kind of the allocator's evidence for a recipe whose `lewis.importance.metric` is `metric`."""
        return metric if self.evidence == "metric" else self.evidence


ALLOCATORS = Table("lewis.allocators", Allocator)
"""Name -> allocator: the values of `lewis.density.strategy`."""


def allocator(
    name: str,
    *,
    paper: str = "",
    evidence: Needs = "nothing",
    keeps_mean: bool = False,
    whole_elements: bool = False,
    guides: bool = True,
    uses: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Register a function as the allocator `name`.

    Args:
        name: its name as `lewis.density.strategy` in a recipe.
        paper: URL of the paper that describes it.
        evidence, keeps_mean, whole_elements, guides, uses: as in `Allocator`.

    Raises:
        ValueError: if another function has that name, or there is no such evidence.
    """
    if evidence not in get_args(Needs):
        raise ValueError(f"{name}: expected evidence of {', '.join(get_args(Needs))}, got {evidence!r}")

    def register(function: Function) -> Function:
        ALLOCATORS.add(Allocator(name, function, paper, evidence, keeps_mean, whole_elements, guides, uses))
        return function

    return register


DEFAULT = "lewis"  # the strategy of a recipe that names none


@allocator("lewis", paper="https://arxiv.org/abs/2503.03874", evidence="metric", uses=("scale", "decimals"))
def lewis(layers: Sequence[Layer], differences: Evidence, policy: Policy) -> dict[str, float]:
    """LEWIS (arXiv 2503.03874): the layer's share in the movement of its projection type, mapped to the bounds.

        N(l,c)   = D(l,c) / sum over l' of D(l',c)                               per projection type c
        rho(l,c) = min + (max - min) (N - min N) / (max N - min N)               one global min-max; all equal: midpoint

    With `scale: rank`, N is replaced by its rank among all layers (equal values share the mean of their ranks). With
    `robust`, values beyond the 5th and the 95th percentile are clipped to these. Under min-max alone one outlier gets
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
    return dict(zip(share, to_bounds(values, policy.min, policy.max), strict=True))


@allocator("owl", paper="https://arxiv.org/abs/2310.05175", evidence="outlier", keeps_mean=True)
def owl(layers: Sequence[Layer], outliers: Evidence, policy: Policy) -> dict[str, float]:
    """OWL (arXiv 2310.05175): blocks with a larger share of outliers keep more; all layers of a block keep the same.

        r_l = 2 lambda (o_l - min o) / (max o - min o);   rho_l = target + r_l - mean r

    lambda is as large as the bounds let it be on both sides of the target (the budget, or the middle of the bounds).
    """
    return _around_target(layers, by_block(layers, outliers), policy)


@allocator("dlp", paper="https://arxiv.org/abs/2505.23807", evidence="median", keeps_mean=True)
def dlp(layers: Sequence[Layer], medians: Evidence, policy: Policy) -> dict[str, float]:
    """DLP (arXiv 2505.23807): blocks with a smaller median score m_l keep more; `owl` with o_l = 1 - m_l / sum m."""
    medians_of = by_block(layers, medians)
    total = sum(medians_of.values())
    return _around_target(layers, {block: 1 - m / total if total else 0.0 for block, m in medians_of.items()}, policy)


@allocator("depth_gradient", paper="https://arxiv.org/abs/2502.14770")
def depth_gradient(layers: Sequence[Layer], evidence: Evidence, policy: Policy) -> dict[str, float]:
    """An arithmetic progression over the depth, from `max` in the first block to `min` in the last one (as ATP,
    arXiv 2502.14770); needs no evidence."""
    last = max(layer.index for layer in layers)
    return {x.key: policy.max - (policy.max - policy.min) * (x.index / last if last else 0.5) for x in layers}


@allocator("global", evidence="threshold", whole_elements=True)
def one_threshold(layers: Sequence[Layer], shares: Evidence, policy: Policy) -> dict[str, float]:
    """The share of a layer's elements above one threshold over all layers; `lewis.allocation.global_threshold` has the
    proof that this leaves the least error."""
    return {layer.key: shares[layer.key] for layer in layers}


@allocator("uniform", guides=False)
def uniform(layers: Sequence[Layer], evidence: Evidence, policy: Policy) -> dict[str, float]:
    """The same density everywhere: the budget, or the middle of the bounds."""
    return {layer.key: target_of(policy) for layer in layers}


def target_of(policy: Policy) -> float:
    """The mean density that allocators which preserve it aim at: the budget, or the middle of the bounds."""
    return policy.budget if policy.budget is not None else (policy.min + policy.max) / 2


def by_block(layers: Sequence[Layer], evidence: Evidence) -> dict[str, float]:
    """Block -> the mean of the evidence of its layers, weighted by their number of parameters."""
    sums: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for layer in layers:
        block = block_of(layer)
        sums[block] = sums.get(block, 0.0) + evidence[layer.key] * layer.parameters
        sizes[block] = sizes.get(block, 0) + layer.parameters
    return {block: total / sizes[block] for block, total in sums.items()}


def block_of(layer: Layer) -> str:
    """The name of the block that a layer is in."""
    return layer.tensor.partition(f".{layer.index}.")[0] + f".{layer.index}"


def to_bounds(values: np.ndarray, low: float, high: float) -> list[float]:
    """Map values linearly to [low, high], the smallest to `low`; equal values are all mapped to the middle."""
    if _all_equal(values):
        return [(low + high) / 2] * len(values)
    x = (values - values.min()) / (values.max() - values.min())
    # Weighted this way, 0 and 1 give the bounds exactly; in between, rounding may step over one.
    return ((1 - x) * low + x * high).clip(low, high).tolist()


def _around_target(layers: Sequence[Layer], values: Mapping[str, float], policy: Policy) -> dict[str, float]:
    target = target_of(policy)
    reach = 2 * min(target - policy.min, policy.max - target)
    spread = np.array(to_bounds(np.array(list(values.values())), 0.0, reach))
    density = dict(zip(values, (target + spread - spread.mean()).clip(policy.min, policy.max).tolist(), strict=True))
    return {layer.key: density[block_of(layer)] for layer in layers}


def _all_equal(values: np.ndarray) -> bool:
    """Whether the values differ by rounding errors only, which must not be stretched over the whole range."""
    return bool(values.max() - values.min() <= 1e-12 * values.max())
