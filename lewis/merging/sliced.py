"""Merges by `slices` (`lewis.models.layers.slices`): of a stack of layers, each slice is a merge of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lewis import store
from lewis.allocation.scales import ScalesByTensor
from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.merging.alignment import Alignment, align
from lewis.merging.expert import Expert
from lewis.merging.memory_budget import MemoryBudget
from lewis.merging.prepared import Prepared
from lewis.merging.resolved import settings_of
from lewis.merging.run import Merge
from lewis.methods import find
from lewis.models.chat_template import chosen_template
from lewis.models.files.folder import tokenizer_files
from lewis.models.layers.slices import Slice, SliceValues, check_ranges, in_place, slices_of
from lewis.models.layers.stack import Layers, Restacked, layers_of, own_head
from lewis.models.layers.stack_config import Origin, restacked
from lewis.models.model import Model, TensorInfo
from lewis.models.names import PER_TOKEN
from lewis.models.tokenizer import FIX, clash, tokenizer_folder
from lewis.recipe.recipe import Recipe

SEMANTICS = "1"  # bump when the same slices would give other bytes


def prepare_slices(
    recipe: Recipe,
    base: Model | None,
    experts: Sequence[Expert],
    held_back: ScalesByTensor | None = None,
    device: str = "cpu",
) -> Merge:
    """Check the merge of a recipe with slices.

    Args:
        recipe: with slices.
        base: the recipe's `base_model`; None if it names none.
        experts: the other models, as `Recipe.experts` lists them.
        held_back, device: as those of `Prepared`.

    Raises:
        RecipeError: naming each range of layers that a model does not have, and each filter that matches nothing.
        InputError: naming what does not fit.
    """
    models = {expert.ref: expert.model for expert in experts}
    models |= {str(recipe.base_model): base} if base is not None else {}
    layers = {ref: layers_of(ref, [*model.tensors, *model.tied]) for ref, model in models.items()}
    counts = {ref: own.count for ref, own in layers.items()}
    check_ranges(recipe, counts)
    slices = slices_of(recipe)
    if in_place(recipe, counts):
        first = base or experts[0].model
        values = SliceValues(slices, layers[recipe.base_model or experts[0].ref])
        recipe.check_filters([*first.tensors, *first.tied])
        settings = settings_of(recipe, first, values.value, values.anchor_value)
        return Merge(settings, base, experts, held_back, device)
    _check_stackable(recipe)
    donor = recipe.base_model or experts[0].ref
    return _stack(recipe, slices, donor, experts, models, layers, held_back or {}, device)


def _check_stackable(recipe: Recipe) -> None:
    what = "layers are put together anew"
    if recipe.output.kind != "full":
        raise InputError(f"output.kind: {what}, so the result is no adapter on the base; use full")
    if recipe.fits:
        raise InputError(
            f"merge_method: {recipe.merge_method} fits a layer to what comes in at its place, and here {what}; use "
            "another method, or slices that leave every layer in its place"
        )
    if recipe.exclude and find(recipe.merge_method).base_is_a_model:
        raise InputError(f"exclude: slices of {recipe.merge_method} have no base that is copied from; use filters")


def _stack(
    recipe: Recipe,
    slices: Sequence[Slice],
    donor: str,
    experts: Sequence[Expert],
    models: Mapping[str, Model],
    layers: Mapping[str, Layers],
    held_back: ScalesByTensor,
    device: str,
) -> Stack:
    """Prepare a stack.

    Args:
        donor: the model that gives the config, the tokenizer and the names.
        experts: with what guides them: densities by the result's tensors, scales by the expert's own.
        models: all models by their references.
        layers: of each.
        held_back: factors of the merged delta by the base's own tensors.
    """
    by_key = sorted((model.key, ref) for ref, model in models.items() if ref != recipe.base_model)
    others = [(ref, models[ref]) for _, ref in by_key]
    vocabulary = align(recipe.vocabulary, recipe.base_model, models[donor], others)
    read = {ref: vocabulary.of(model) for ref, model in models.items()}
    result = layers_of(donor, read[donor].tensors)
    values = SliceValues(slices, result)
    known = {expert.ref: expert for expert in experts}
    parts, names, origins = list[Merge](), dict[str, None](), list[list[Origin]]()
    for each in slices:
        views = {ref: Restacked(read[ref], each.names(ref, layers, result)) for ref in each.starts}
        lead = views[each.lead]
        _check_sizes(donor, read[donor], result, each, lead)
        names |= dict.fromkeys(name for view in views.values() for both in view.names.items() for name in both)
        own = [
            _seen(known.get(ref) or Expert(ref, views[ref]), views[ref])  # one slice's expert is another's base
            for ref in (entry.model for entry in each.recipe.experts)
        ]
        settings = settings_of(each.recipe, lead, values.value, values.anchor_value)
        settings = replace(settings, vocabulary=None, chat_template=None)
        matched = Alignment(tokenizer_folder(models[donor]), models[donor]) if recipe.vocabulary else None
        base = lead if each.recipe.base_model else None
        parts.append(Merge(settings, base, own, _by_new_names(held_back, lead), device, matched))
        in_order = [each.lead, *(ref for ref in each.starts if ref != each.lead)]
        for i in range(each.count):
            places = [(ref, models[ref], each.starts[ref] + i) for ref in in_order]
            origins.append([Origin(ref, own.home, own.config, i, layers[ref].count) for ref, own, i in places])
    recipe.check_filters([*names, *models[donor].tied])
    if not recipe.vocabulary:
        _check_vocabularies(donor, models)
    _check_heads(donor, models, slices[-1])
    config = restacked(models[donor].config, models[donor].home, origins)
    folders = [tokenizer_folder(models[ref]) for ref in dict.fromkeys([donor, *models])]
    return Stack(Whole(read[donor], config, parts), parts, vocabulary, chosen_template(recipe.chat_template, folders))


def _seen(expert: Expert, view: Restacked) -> Expert:
    """An expert as a slice has it."""
    scales = None if expert.scales is None else _by_new_names(expert.scales, view)
    return replace(expert, model=view, scales=scales)


def _by_new_names(scales: ScalesByTensor, view: Restacked) -> ScalesByTensor:
    return {new: scales[old] for new, old in view.names.items() if old in scales}


def _check_sizes(donor: str, model: Model, result: Layers, each: Slice, lead: Model) -> None:
    """Check that the layers of a slice have the sizes of the donor's, as far as these have the same tensors."""
    known: dict[str, set[tuple[int, ...]]] = {}
    for i, suffixes in enumerate(result.tensors):
        for suffix in suffixes:
            known.setdefault(suffix, set()).add(model.tensors[result.name(i, suffix)].shape)
    for name in [*(result.before if each.opens else ()), *(result.after if each.closes else ())]:
        if name not in lead.tensors:
            raise InputError(f"{each.lead}: slices: it has no {name!r}, which the result needs; {donor} has it")
        known[name] = {model.tensors[name].shape}
    for name, info in lead.tensors.items():
        suffix = name.removeprefix(result.prefix).partition(".")[2] if name.startswith(result.prefix) else name
        shapes = known.get(suffix, {info.shape})
        if info.shape not in shapes:
            told = f"{each.lead}: slices: {name!r} of the result has shape {list(info.shape)} there, in {donor} it is "
            fix = f"; {FIX}" if name.endswith(PER_TOKEN) else "; layers of models of other sizes cannot be stacked"
            raise InputError(f"{told}{list(min(shapes))}{fix}")


def _check_vocabularies(donor: str, models: Mapping[str, Model]) -> None:
    for ref, model in models.items():
        if other := clash(tokenizer_folder(models[donor]), tokenizer_folder(model)):
            raise InputError(f"{ref}: another vocabulary than {donor}: {other}; {FIX}")


def _check_heads(donor: str, models: Mapping[str, Model], last: Slice) -> None:
    """Check that no head of the last slice gets lost because the donor ties its own to the embedding."""
    for ref in last.starts if models[donor].tied else ():
        if ref != donor and (head := own_head(models[ref])):
            raise InputError(
                f"{ref}: slices: its {head!r} is a weight of its own, and the result's is tied to the embedding, since "
                f"{donor} gives its config; set base_model to a model with a head of its own"
            )


class Whole:
    """What the merges of all slices start from, as one model with the result's names and config."""

    def __init__(self, donor: Model, config: dict[str, Any], parts: Sequence[Prepared]) -> None:
        """
        Args:
            donor: gives the config, the tokenizer, and whether the head is tied.
            config: of the result.
            parts: the slices.
        """
        self.folder, self.home, self.key, self.config = donor.folder, donor.home, donor.key, config
        self.tensors: dict[str, TensorInfo] = {name: info for part in parts for name, info in part.base.tensors.items()}
        self.tied = donor.tied
        self._models = {name: part.base for part in parts for name in part.base.tensors}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as the base of its slice."""
        return self._of(name).read(self.tied.get(name, name))

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype and bits, as those of its slice's base."""
        return self._of(name).raw(self.tied.get(name, name))

    def computes(self, name: str) -> bool:
        """Whether a tensor is computed, as of its slice's base."""
        return self._of(name).computes(self.tied.get(name, name))

    def will_need(self, name: str) -> None:
        """Announce a tensor that is read soon."""
        self._of(name).will_need(self.tied.get(name, name))

    def done_with(self, name: str) -> None:
        """Let go of a tensor."""
        self._of(name).done_with(self.tied.get(name, name))

    def _of(self, name: str) -> Model:
        return self._models[self.tied.get(name, name)]


class Stack(Merge):
    """A merge whose result has other layers than its base: each slice is prepared as a merge of its own."""

    def __init__(self, base: Whole, parts: Sequence[Merge], vocabulary: Alignment, chat_template: str | None) -> None:
        """
        Args:
            base: what the slices start from.
            parts: the slices, in the order of the result.
            vocabulary: whose tokenizer the result has.
            chat_template: that the tokenizer gets; None: it keeps its own.
        """
        first = parts[0]
        self.settings, self.method, self.device = first.settings, first.method, first.device
        self.base, self.vocabulary, self.chat_template = base, vocabulary, chat_template
        self.adds_to_base, self.held_back, self._anchor = first.adds_to_base, {}, None
        self.parts, self._giving = parts, {name: part for part in parts for name in part.layout}
        self.experts = list({expert.ref: expert for part in parts for expert in part.experts}.values())
        self.excluded = frozenset(name for part in parts for name in part.excluded)
        self.layout = {name: place for part in parts for name, place in part.layout.items()}
        self.size, self.elements = sum(part.size for part in parts), sum(part.elements for part in parts)
        self.traffic = sum(part.traffic for part in parts)
        self.budget = MemoryBudget(max(part.budget.size for part in parts))
        for part in parts:
            part.budget = self.budget
        self.digest = self._digest()

    @property
    def guided(self) -> Sequence[Prepared]:
        """The merges of the slices."""
        return self.parts

    def giving(self, name: str) -> Prepared:
        """The merge of the slice that a tensor is in."""
        return self._giving[name]

    @property
    def models(self) -> list[Model]:
        """The models of all slices."""
        return [self.base, *(model for part in self.parts for model in part.models)]

    def compiles(self, name: str) -> bool:
        """Whether there are compiled loops for one tensor's method and parameters."""
        return self._giving[name].compiles(name)

    def parameters(self, name: str) -> dict[str, Any]:
        """The method's parameters for one tensor, by its slice."""
        return self._giving[name].parameters(name)

    def _read_for(self, name: str) -> list[Model]:
        return self._giving[name]._read_for(name)

    def _digest(self) -> str:
        places = [
            [sorted(model.names.items()) for model in part.models if isinstance(model, Restacked)]
            for part in self.parts
        ]
        return store.digest(
            {
                "semantics": SEMANTICS,
                "slices": [part.digest for part in self.parts],
                "places": places,
                "config": self.base.config,
                **({"chat_template": self.chat_template} if self.chat_template else {}),
                **({"vocabulary": self.vocabulary.digest} if self.vocabulary.digest else {}),
                "tokenizer": {path.name: store.file_sha256(path) for path in tokenizer_files(self.vocabulary.donor)},
            }
        )
