"""How far the layers of an expert moved from the base: the metrics that allocators work on.

`norm_difference` compares two measured norms. The others look at the task vector itself, delta = W_expert - W_base,
weighted by the activations of the expert: they need no pass over the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from lewis.errors import InputError
from lewis.importance.measure import row_sums
from lewis.lazy_torch import torch
from lewis.models.layers.slices import in_place, slices_of
from lewis.models.layers.stack import Restacked, layers_of
from lewis.models.model import Model
from lewis.models.names import layer_of
from lewis.models.network.module_tree import Covered
from lewis.recipe.config import MergeConfig

OUTLIER = 5.0  # OWL's M: an outlier is larger than M times the mean
UNRELATED = 0.3  # if every layer differs by more, relative to its norm, the base is hardly this expert's ancestor
SAMPLE = 8  # number of tensors that `unrelated` looks at

Norms = Mapping[str, float | None]
T = TypeVar("T")


@dataclass(frozen=True)
class InResult:
    """An expert and the base, with their tensors under the names that the merged result gives them.

    Attributes:
        base, expert: the opened models; where slices reorder layers, only tensors of layers that the expert goes into.
        covered: the covered ones of these tensors.
    """

    base: Model
    expert: Model
    covered: tuple[Covered, ...]

    def of_base(self, measured: Mapping[str, T]) -> Mapping[str, T]:
        """Return values that were measured of the base, under the result's names.

        Args:
            measured: name of a tensor, or key of a layer -> value.
        """
        return _under_new_names(self.base, measured)

    def of_expert(self, measured: Mapping[str, T]) -> Mapping[str, T]:
        """Return values that were measured of the expert, under the result's names; as `of_base`."""
        return _under_new_names(self.expert, measured)


def in_result(
    config: MergeConfig, base: Model, experts: Mapping[str, Model], covered: Sequence[Covered]
) -> dict[str, InResult]:
    """Return each expert and the base under the result's names, which are their own unless slices reorder layers.

    Args:
        config: the merge, with its slices.
        base: the opened base.
        experts: reference -> opened expert.
        covered: the covered tensors of the base.
    """
    if not is_stack(config, base, experts):
        return {ref: InResult(base, model, tuple(covered)) for ref, model in experts.items()}
    slices, ours = slices_of(config), str(config.base_model)
    layers = {ref: layers_of(ref, [*model.tensors, *model.tied]) for ref, model in {**experts, ours: base}.items()}
    known, found = {each.tensor: each for each in covered}, {}
    for ref, model in experts.items():
        names: dict[str, dict[str, str]] = {ref: {}, ours: {}}
        for each in slices:
            if ref in each.starts:
                for name in names:
                    names[name] |= each.names(name, layers, layers[ours])
        seen = Restacked(base, names[ours])
        moved = tuple(_renamed(known[old], new) for new, old in seen.names.items() if old in known)
        found[ref] = InResult(seen, Restacked(model, names[ref]), moved)
    return found


def is_stack(config: MergeConfig, base: Model, experts: Mapping[str, Model]) -> bool:
    """Whether slices give the result other layers than the base, or the same in another order."""
    if not config.slices:
        return False
    models = {**experts, str(config.base_model): base}
    counts = {ref: layers_of(ref, [*model.tensors, *model.tied]).count for ref, model in models.items()}
    return not in_place(slices_of(config), config.base_model, counts)


def norm_difference(base: Norms, expert: Norms) -> dict[str, float | None]:
    """LEWIS's D(l,c) = | I_expert(l,c) - I_base(l,c) | per layer; None where no token reached one of the two.

    Raises:
        InputError: if the two were not measured on the same layers.
    """
    if base.keys() != expert.keys():
        odd = sorted(base.keys() ^ expert.keys())[0]
        raise InputError(
            f"importance: {odd!r} was measured in one of base and expert only; they differ in architecture"
        )
    found: dict[str, float | None] = {}
    for key, own in expert.items():
        other = base[key]
        found[key] = None if own is None or other is None else abs(own - other)
    return found


def unrelated(ref: str, base: Model, expert: Model, tensors: Sequence[str]) -> str | None:
    """Return a warning if weights differ so much everywhere that the base is hardly this expert's ancestor, else None.

    Independent weights of equal norm differ by 141 % of it, fine-tunes from their base by a few percent. Only some of
    the tensors are compared.
    """
    few = tensors[:: max(1, len(tensors) // SAMPLE)]
    norms = [float(base.read(name).to(torch.float32).norm()) for name in few]
    moved = [float(task_vector(base, expert, name).norm()) for name in few]
    gaps = [gap / norm if norm else 0.0 for gap, norm in zip(moved, norms, strict=True)]
    if not min(gaps) > UNRELATED:  # or NaN, which the measurement or the merge refuses
        return None
    return (
        f"{ref}: its weights differ from the base's by {100 * min(gaps):.0f} to {100 * max(gaps):.0f} % of their norm "
        f"in all {len(gaps)} layers looked at (a fine-tune's by a few percent): is base_model the model that it was "
        "fine-tuned from?"
    )


def of_task_vector(
    metric: str, base: Model, expert: Model, covered: Sequence[Covered], moments: Mapping[str, torch.Tensor]
) -> dict[str, float | None]:
    """A metric of the task vector of each layer.

        delta_norm  || delta * sqrt(s) ||_F: sees the rotations and changes of sign that a difference of norms cannot
        outlier     OWL's share of elements whose |delta| sqrt(s) is larger than 5 times the layer's mean
        median      of |delta| sqrt(s), for DLP

    Args:
        metric: `delta_norm`, `outlier` or `median`.
        base, expert: opened.
        covered: the covered tensors.
        moments: s of the expert per tensor.

    Returns:
        Key of a layer -> value; None where no token reached it.
    """
    found: dict[str, float | None] = {}
    for each in covered:
        if each.tensor not in moments:
            found |= dict.fromkeys((layer.key for layer in each.layers), None)
            continue
        delta, s = task_vector(base, expert, each.tensor), moments[each.tensor]
        if metric == "delta_norm":
            costs = row_sums(delta.square(), s, each)
            found |= {layer.key: float(cost) ** 0.5 for layer, cost in zip(each.layers, costs, strict=True)}
            continue
        scores = delta.abs_() * s.sqrt()
        for layer, values in zip(each.layers, by_layer(scores, each), strict=True):
            if metric == "outlier":
                found[layer.key] = float((values > OUTLIER * values.mean(dtype=np.float64)).mean())
            else:
                found[layer.key] = float(np.median(values))
    return found


def task_vector(base: Model, expert: Model, tensor: str) -> torch.Tensor:
    """W_expert - W_base of one tensor, fp32."""
    return expert.read(tensor).to(torch.float32) - base.read(tensor).to(torch.float32)


def by_layer(values: torch.Tensor, covered: Covered) -> Iterator[np.ndarray]:
    """The values of each layer of a tensor, in any order, as one row."""
    axis = values.dim() - (1 if covered.transposed else 2)
    for rows in covered.rows:
        yield (values if rows is None else rows.take(values, axis)).reshape(-1).numpy()


def _renamed(covered: Covered, tensor: str) -> Covered:
    number = layer_of(tensor)
    layers = [
        replace(layer, tensor=tensor, index=layer.index if number is None else number) for layer in covered.layers
    ]
    return replace(covered, tensor=tensor, layers=tuple(layers))


def _under_new_names(model: Model, measured: Mapping[str, T]) -> Mapping[str, T]:
    if not isinstance(model, Restacked):
        return measured
    keys: dict[str, list[str]] = {}
    for key in measured:
        keys.setdefault(key.partition("[")[0], []).append(key)
    return {new + key.removeprefix(old): measured[key] for new, old in model.names.items() for key in keys.get(old, ())}
