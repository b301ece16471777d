"""The layers of an expert and of its base as a result of slices has them, so that densities are those of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lewis.models.layers.slices import in_place, slices_of
from lewis.models.layers.stack import Restacked, layers_of
from lewis.models.model import Model
from lewis.models.names import layer_of
from lewis.models.network.module_tree import Covered
from lewis.recipe.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class InResult:
    """An expert and its base under the result's names.

    Attributes:
        base, expert: opened; of the tensors that the expert goes into.
        covered: of these tensors.
    """

    base: Model
    expert: Model
    covered: tuple[Covered, ...]

    def of_base(self, measured: Mapping[str, T]) -> Mapping[str, T]:
        """What was measured of the base, under the result's names.

        Args:
            measured: by tensors, or by keys of layers.
        """
        return _under_new_names(self.base, measured)

    def of_expert(self, measured: Mapping[str, T]) -> Mapping[str, T]:
        """What was measured of the expert; as `of_base`."""
        return _under_new_names(self.expert, measured)


def in_result(
    recipe: Recipe, base: Model, experts: Mapping[str, Model], covered: Sequence[Covered]
) -> dict[str, InResult]:
    """Each expert as the result has its layers: as it is, unless slices put layers together anew.

    Args:
        recipe: the recipe.
        base: the base.
        experts: by their references.
        covered: of the base.
    """
    if not is_stack(recipe, base, experts):
        return {ref: InResult(base, model, tuple(covered)) for ref, model in experts.items()}
    slices, ours = slices_of(recipe), str(recipe.base_model)
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


def is_stack(recipe: Recipe, base: Model, experts: Mapping[str, Model]) -> bool:
    """Whether the result has other layers than the base."""
    if not recipe.slices:
        return False
    models = {**experts, str(recipe.base_model): base}
    return not in_place(recipe, {ref: layers_of(ref, [*m.tensors, *m.tied]).count for ref, m in models.items()})


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
