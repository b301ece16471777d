"""Slices of layers: each is a merge of its own, and knows which tensors of its models it reads.

Where every layer stays in its place, slices only give layers their own parameters. Otherwise the result is a stack of
other layers than any model's. What lies before the layers (embeddings) comes from the first slice, what lies after them
(the last norm, the head) from the last, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lewis.errors import RecipeError
from lewis.methods import Parameter, find
from lewis.models.layers.stack import Layers, as_source
from lewis.recipe.config import MergeConfig
from lewis.recipe.schema import ModelEntry


@dataclass(frozen=True)
class Slice:
    """A run of layers of the result, and the merge that makes them.

    Attributes:
        config: of the slice alone: its sources are the models, its parameters take precedence over the top level's.
        first, count: its first layer in the result, and how many it has.
        starts: model -> number of the first of its layers that go in.
        lead: the model that gives the names: the base if the method has one, else the first source.
        opens, closes: whether it is the first, or the last, slice.
    """

    config: MergeConfig
    first: int
    count: int
    starts: Mapping[str, int]
    lead: str
    opens: bool
    closes: bool

    @property
    def base(self) -> str | None:
        """The base that the slice is merged onto; None if its method needs none."""
        return self.config.base_model

    @property
    def experts(self) -> list[str]:
        """The models that are merged, without the base."""
        return [entry.model for entry in self.config.experts]

    @property
    def in_order(self) -> list[str]:
        """All models of the slice, the one that gives the names first."""
        return [self.lead, *(ref for ref in self.starts if ref != self.lead)]

    def depth(self, layer: int | None) -> float:
        """The position in [0, 1] of a layer of the result within the slice, for gradients; 0 outside of the layers."""
        if layer is None:
            return 0.0
        return (layer - self.first) / (self.count - 1) if self.count > 1 else 1.0

    def source(self, tensor: str, model: str) -> str:
        """The name that a tensor of the result has in one of the models."""
        return as_source(tensor, self.starts[model] - self.first)

    def names(self, model: str, layers: Mapping[str, Layers], result: Layers) -> dict[str, str]:
        """Return the tensors that a model gives to this slice, by their names in the result.

        Args:
            model: one of the sources.
            layers: model -> its layers.
            result: the layers of the model that names the result's tensors.

        Returns:
            Name in the result -> name in the model.
        """
        own, start = layers[model], self.starts[model]
        found = {name: name for name in result.before if self.opens}
        for i in range(self.count):
            suffixes = own.tensors[start + i]
            found |= {result.name(self.first + i, suffix): own.name(start + i, suffix) for suffix in suffixes}
        return found | {name: name for name in result.after if self.closes}


def slices_of(config: MergeConfig) -> tuple[Slice, ...]:
    """The slices of a config; none if it has `models`."""
    found, first = list[Slice](), 0
    listed, method = config.slices or (), find(config.merge_method)
    for number, each in enumerate(listed):
        base = None if method.base_is_a_model else each.base_model or config.base_model
        keys = [*each.parameters, *config.parameters]
        parameters = {key: (*each.parameters.get(key, ()), *config.parameters.get(key, ())) for key in keys}
        models = tuple(ModelEntry(model=source.model, parameters=source.parameters) for source in each.sources)
        own = config.model_copy(update={"models": models, "parameters": parameters, "base_model": base, "slices": None})
        starts = {source.model: source.layer_range[0] for source in each.sources}
        ends = number == 0, number == len(listed) - 1
        found.append(Slice(own, first, each.layers, starts, base or models[0].model, *ends))
        first += each.layers
    return tuple(found)


def check_ranges(slices: Sequence[Slice], counts: Mapping[str, int]) -> None:
    """Check that the models have the layers that the slices name.

    Args:
        slices: all of a config.
        counts: model -> how many layers it has; a model that is left out is not checked.

    Raises:
        RecipeError: naming each range that goes beyond.
    """
    problems = [
        f"slices[{i}].sources[{j}].layer_range: expected at most {counts[model]}, the number of layers of {model}, "
        f"got {[start, start + each.count]}"
        for i, each in enumerate(slices)
        for j, (model, start) in enumerate(each.starts.items())
        if start + each.count > counts.get(model, start + each.count)
    ]
    if problems:
        raise RecipeError(problems)


def in_place(slices: Sequence[Slice], base: str | None, counts: Mapping[str, int]) -> bool:
    """Whether every layer stays in its place: it is merged from the layers of its own number, of the same whole models.

    Args:
        slices: all of a config.
        base: the config's `base_model`.
        counts: model -> how many layers it has.
    """
    total, models = sum(each.count for each in slices), slices[0].starts.keys()
    same = all((each.starts.keys(), each.base) == (models, slices[0].base) for each in slices)
    return (
        same
        and all(start == each.first for each in slices for start in each.starts.values())
        and all(count == total for count in counts.values())
        and (slices[0].base in (None, base))
    )


class SliceValues:
    """Looks up merge parameters for the result's tensors, each in the slice that the tensor is in."""

    def __init__(self, slices: Sequence[Slice], layers: Layers) -> None:
        """
        Args:
            slices: all of a config.
            layers: of the model that names the result's tensors.
        """
        self._slices, self._result, self._before = slices, layers, frozenset(layers.before)
        self._entries = [{entry.model: entry for entry in each.config.experts} for each in slices]

    def value(self, parameter: Parameter, expert: str | None, tensor: str, depth: float) -> Any:
        """Return the value for one tensor; arguments as those of `MergeConfig.value`; `depth` is not used."""
        return self._look_up(lambda config: config.value, parameter, expert, tensor)

    def anchor_value(self, parameter: Parameter, expert: str | None, tensor: str, depth: float) -> Any:
        """Return a parameter's value as `value` does, but for the anchor's method."""
        return self._look_up(lambda config: config.anchor_value, parameter, expert, tensor)

    def _look_up(
        self, of: Callable[[MergeConfig], Callable[..., Any]], parameter: Parameter, expert: str | None, tensor: str
    ) -> Any:
        layer = self._result.number(tensor)
        ends = [each.first + each.count for each in self._slices]
        outside = 0 if tensor in self._before else -1
        number = outside if layer is None else next((i for i, end in enumerate(ends) if layer < end), -1)
        each, entries = self._slices[number], self._entries[number]
        name = tensor if expert is None or layer is None else each.source(tensor, expert)
        return of(each.config)(parameter, None if expert is None else entries[expert], name, each.depth(layer))
