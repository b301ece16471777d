"""Merges by `slices` (`lewis.models.layers.slices`): each slice of the result's layers is a merge of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from lewis import store
from lewis.allocation.densities import ScalesByTensor
from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.merging.memory_budget import MemoryBudget
from lewis.merging.prepared import Prepared
from lewis.merging.run import Merge
from lewis.merging.settings import Expert, MergeSettings
from lewis.merging.vocabulary.alignment import Alignment, align
from lewis.models.chat_template import chosen_template
from lewis.models.layers.slices import Slice, SliceValues, check_ranges, in_place
from lewis.models.layers.stack import Layers, Restacked, layers_of, own_head
from lewis.models.layers.stack_config import origins_of, restacked
from lewis.models.model import Model, TensorInfo
from lewis.models.names import PER_TOKEN
from lewis.models.tokenizer import FIX, clash, tokenizer_folder

SEMANTICS = "1"  # bump when the same slices would give other bytes


def placed(settings: MergeSettings, models: Mapping[str, Model]) -> MergeSettings:
    """Check slices against the models, and replace them by values for each layer if every layer stays in its place.

    Args:
        settings: settings with slices.
        models: reference -> model; the base first.

    Returns:
        Settings without slices, but with the slices' values; the given settings if the result is another stack.

    Raises:
        RecipeError: naming each range of layers that a model does not have.
        InputError: if a model has no stack of layers, or the layers cannot be stacked.
    """
    layers = {ref: layers_of(ref, [*model.tensors, *model.tied]) for ref, model in models.items()}
    counts = {ref: own.count for ref, own in layers.items()}
    check_ranges(settings.slices, counts)
    if in_place(settings.slices, settings.base, counts):
        values = SliceValues(settings.slices, next(iter(layers.values())))
        anchor = settings.anchor and replace(settings.anchor, value=values.anchor_value)
        return replace(settings, value=values.value, anchor=anchor, slices=())
    _check_stackable(settings)
    return settings


def _check_stackable(settings: MergeSettings) -> None:
    what = "layers are put together in another order"
    if settings.output.kind != "full":
        raise InputError(f"output.kind: {what}, so the result is no adapter on the base; use full")
    if settings.method.fits:
        raise InputError(
            f"merge_method: {settings.method.name} fits a layer to what comes in at its place, and here {what}; use "
            "another method, or slices that leave every layer in its place"
        )
    if settings.exclude and settings.method.base_is_a_model:
        raise InputError(f"exclude: slices of {settings.method.name} have no base that is copied from; use filters")


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
            problem = (
                f"{each.lead}: slices: {name!r} of the result has shape {list(info.shape)} there, in {donor} it is "
            )
            fix = f"; {FIX}" if name.endswith(PER_TOKEN) else "; layers of models of other sizes cannot be stacked"
            raise InputError(f"{problem}{list(min(shapes))}{fix}")


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
    """The bases of all slices as one model with the result's names and config; reads like a checkpoint."""

    def __init__(self, donor: Model, config: dict[str, Any], parts: Sequence[Prepared]) -> None:
        """
        Args:
            donor: gives the config, the tokenizer, and whether the head is tied.
            config: the result's config.
            parts: the prepared merges of the slices.
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
        """Read one tensor from the base of its slice."""
        return self._of(name).read(self.tied.get(name, name))

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Return one tensor's dtype and bits from the base of its slice."""
        return self._of(name).raw(self.tied.get(name, name))

    def computes(self, name: str) -> bool:
        """Whether the base of a tensor's slice computes it when it is read."""
        return self._of(name).computes(self.tied.get(name, name))

    def will_need(self, name: str) -> None:
        """Ask the system to read a tensor ahead."""
        self._of(name).will_need(self.tied.get(name, name))

    def done_with(self, name: str) -> None:
        """Release the memory that a tensor is mapped to."""
        self._of(name).done_with(self.tied.get(name, name))

    def _of(self, name: str) -> Model:
        return self._models[self.tied.get(name, name)]


class _Stacked:
    """The models whose layers a stack is made of; used while its slices are prepared."""

    def __init__(self, settings: MergeSettings, models: Mapping[str, Model], vocabulary: Alignment) -> None:
        self._settings, self._models, self._donor = settings, models, next(iter(models))
        self.read = {ref: vocabulary.of(model) for ref, model in models.items()}
        self._layers = {ref: layers_of(ref, [*model.tensors, *model.tied]) for ref, model in models.items()}
        self._result = layers_of(self._donor, self.read[self._donor].tensors)
        self._values = SliceValues(settings.slices, self._result)
        self._names = dict[str, None]()  # of all tensors, in the result and in the models

    def part(self, each: Slice, experts: Mapping[str, Expert], factors: ScalesByTensor, device: str) -> Merge:
        donor = self._models[self._donor]
        views = {ref: Restacked(self.read[ref], each.names(ref, self._layers, self._result)) for ref in each.starts}
        lead = views[each.lead]
        _check_sizes(self._donor, self.read[self._donor], self._result, each, lead)
        self._names |= dict.fromkeys(name for view in views.values() for both in view.names.items() for name in both)
        own = []
        for ref in each.experts:
            expert = experts.get(ref) or Expert(ref, views[ref])  # one slice's expert is another's base
            scales = expert.scales and _by_new_names(expert.scales, views[ref])
            own.append(replace(expert, model=views[ref], scales=scales))
        settings = replace(
            self._settings, base=each.base, value=self._values.value, vocabulary=None, chat_template=None, slices=()
        )
        matched = Alignment(tokenizer_folder(donor), donor) if self._settings.vocabulary else None
        return Merge.of(settings, lead if each.base else None, own, _by_new_names(factors, lead), device, matched)

    def check(self) -> None:
        """Check what concerns all slices, once each is prepared: filters, vocabularies, the head."""
        self._settings.check_filters(self._names, self._models[self._donor].tied)
        if not self._settings.vocabulary:
            _check_vocabularies(self._donor, self._models)
        _check_heads(self._donor, self._models, self._settings.slices[-1])

    def config(self) -> dict[str, Any]:
        homes = {ref: model.home for ref, model in self._models.items()}
        configs = {ref: model.config for ref, model in self._models.items()}
        counts = {ref: layers.count for ref, layers in self._layers.items()}
        origins = origins_of(self._settings.slices, homes, configs, counts)
        return restacked(configs[self._donor], homes[self._donor], origins)


@dataclass(frozen=True, eq=False)
class Stack(Merge):
    """A merge whose result has other layers than its base: each slice is prepared as a merge of its own.

    Attributes:
        parts: the slices, in the order of the result.
    """

    parts: tuple[Merge, ...] = ()

    @classmethod
    def of(
        cls,
        settings: MergeSettings,
        base: Model | None,
        experts: Sequence[Expert],
        factors: ScalesByTensor | None = None,
        device: str = "cpu",
        vocabulary: Alignment | None = None,
    ) -> Self:
        """Prepare each slice as `Merge.of` does; the first model gives the config, the tokenizer and the names.

        Densities are given by the names of the result's tensors, scales by the expert's, and `factors` by the base's.
        """
        models = {settings.base: base} if base is not None and settings.base else {}
        models |= {expert.ref: expert.model for expert in experts if expert.ref != settings.base}
        donor = next(iter(models))
        by_key = sorted((model.key, ref) for ref, model in models.items() if ref != settings.base)
        others = [(ref, models[ref]) for _, ref in by_key]
        vocabulary = vocabulary or align(settings.vocabulary, settings.base, models[donor], others)
        stacked = _Stacked(settings, models, vocabulary)
        known = {expert.ref: expert for expert in experts}
        parts = [stacked.part(each, known, factors or {}, device) for each in settings.slices]
        stacked.check()
        budget = MemoryBudget(max(part.budget.size for part in parts))
        return cls(
            settings=parts[0].settings,
            base=Whole(stacked.read[donor], stacked.config(), parts),
            experts=tuple({expert.ref: expert for part in parts for expert in part.experts}.values()),
            adds_to_base=parts[0].adds_to_base,
            vocabulary=vocabulary,
            excluded=frozenset(name for part in parts for name in part.excluded),
            budget=budget,
            device=device,
            chat_template=chosen_template(settings.chat_template, [tokenizer_folder(each) for each in models.values()]),
            parts=tuple(replace(part, budget=budget) for part in parts),
        )

    @cached_property
    def _makers(self) -> Mapping[str, Merge]:
        return {name: part for part in self.parts for name in part.layout}

    def maker_of(self, name: str) -> Prepared:
        """The merge of the slice that a tensor is in."""
        return self._makers[name]

    @cached_property
    def layout(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> dtype and shape of the output, slice by slice."""
        return {name: place for part in self.parts for name, place in part.layout.items()}

    @property
    def traffic(self) -> int:
        """Bytes of the tensors of all inputs and of the output."""
        return sum(part.traffic for part in self.parts)

    @property
    def models(self) -> list[Model]:
        """The models of all slices."""
        return [self.base, *(model for part in self.parts for model in part.models)]

    def parameters(self, name: str) -> dict[str, Any]:
        """The method's parameters for one tensor, by its slice."""
        return self._makers[name].parameters(name)

    def models_with(self, name: str) -> list[Model]:
        """The models that are read for one tensor of the result, by its slice."""
        return self._makers[name].models_with(name)

    @cached_property
    def digest(self) -> str:
        """Identity of the result: the merges of the slices, and where their layers come from."""
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
                **self._copied_files(),
            }
        )
