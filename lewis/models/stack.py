"""The stack of layers of a model, and a model whose layers are read under other numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.models.model import Model, TensorInfo, View
from lewis.models.names import EMBEDDINGS, HEADS, layer_of
from lewis.models.safetensors_file import same_bits

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_BEFORE = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|shared|project_in)(\.|$)")
_AFTER = re.compile(r"embedding_norm")  # LFM2's last norm


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a model.

    Attributes:
        prefix: what comes before the number in the names of their tensors, with the dot.
        count: how many there are.
        tensors: of each layer, what comes after the number; in the order of the checkpoint.
        before, after: the other tensors: those that the first layer's input comes from, and those that come after the
            last one's output.
    """

    prefix: str
    count: int
    tensors: tuple[tuple[str, ...], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    def name(self, layer: int, suffix: str) -> str:
        """The name of a tensor of a layer."""
        return f"{self.prefix}{layer}.{suffix}"


def layers_of(ref: str, names: Iterable[str]) -> Layers:
    """Find the stack of layers that the names of a model's tensors speak of.

    Args:
        ref: of the model, for error messages.
        names: of its tensors, tied ones included.

    Raises:
        InputError: if there is none, or more than one.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    outside = []
    for name in names:
        match = _NUMBER.search(name)
        if match is None:
            outside.append(name)
        else:
            stacks.setdefault(name[: match.start(1)], {}).setdefault(int(match[1]), []).append(name[match.end() :])
    if len(stacks) != 1:
        found = ", ".join(f"{prefix}*" for prefix in stacks) or "no numbered layers"
        raise InputError(
            f"{ref}: slices need a model with one stack of layers, got {found}; list the models under `models`, and "
            "give layers their own values by filters or gradients"
        )
    [(prefix, layers)] = stacks.items()
    if set(layers) != set(range(len(layers))):
        gap = min(set(range(len(layers))) - set(layers))
        raise InputError(f"{ref}: its tensors are of {len(layers)} layers, but none is of layer {gap}")
    return Layers(
        prefix,
        len(layers),
        tuple(tuple(layers[i]) for i in range(len(layers))),
        tuple(name for name in outside if is_before_layers(name)),
        tuple(name for name in outside if not is_before_layers(name)),
    )


def other_depth(one: Model, other: Model) -> bool:
    """Whether two models have different numbers of layers."""
    depths = [1 + max((layer_of(name) or 0 for name in model.tensors), default=0) for model in (one, other)]
    return depths[0] != depths[1]


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside of the layers belongs to the input: an embedding or its norm, not the head."""
    return bool(_BEFORE.search(name)) and not _AFTER.search(name) and not name.endswith(HEADS)


def as_source(tensor: str, moved: int) -> str:
    """The name of a layer's tensor in a model that has this layer `moved` places further up; others are as they are."""
    return tensor if layer_of(tensor) is None else _NUMBER.sub(lambda m: _shifted(m, moved), tensor, count=1)


def _shifted(match: re.Match[str], by: int) -> str:
    return match[0].replace(match[1], str(int(match[1]) + by))


class Restacked(View):
    """A part of a model under other names; reads like a `Checkpoint`.

    Attributes:
        model: the model.
        names: name -> the name in the model.
        folder, key, config: those of the model.
        tensors: name -> what is stored.
        tied: nothing; a tied head among the names is read from the embedding.
    """

    def __init__(self, model: Model, names: Mapping[str, str]) -> None:
        """
        Args:
            model: the model.
            names: name -> the name in the model; those that the model does not have are left out.
        """
        stored = {new: model.tied.get(old, old) for new, old in names.items()}
        self.model, self.names = model, {new: old for new, old in stored.items() if old in model.tensors}
        self.folder, self.key, self.config = model.folder, model.key, model.config
        self.tensors: dict[str, TensorInfo] = {new: model.tensors[old] for new, old in self.names.items()}
        self.tied: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as the model reads it."""
        return self.model.read(self.names[name])

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype and bits, as the model gives them."""
        return self.model.raw(self.names[name])

    def computes(self, name: str) -> bool:
        """Whether a tensor is computed, as of the model."""
        return self.model.computes(self.names[name])

    def will_need(self, name: str) -> None:
        """Announce a tensor that is read soon, as to the model."""
        self.model.will_need(self.names[name])

    def done_with(self, name: str) -> None:
        """Let go of a tensor, as of the model's."""
        self.model.done_with(self.names[name])


def own_head(model: Model) -> str | None:
    """The name of a head that is a weight of its own and differs from the embedding; None if there is none."""
    heads = [name for name in model.tensors if name.endswith(HEADS)]
    embeddings = [name for name in model.tensors if name.endswith(EMBEDDINGS)]
    for head in heads:
        if not any(_same(model, head, embedding) for embedding in embeddings):
            return head
    return None


def _same(model: Model, one: str, other: str) -> bool:
    if model.tensors[one].shape != model.tensors[other].shape:
        return False
    (kind, bits), (other_kind, other_bits) = model.raw(one), model.raw(other)
    return kind == other_kind and same_bits(bits, other_bits)
