"""The stack of layers of a model, and a model whose layers are read under other numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.models.files.safetensors_file import same_bits
from lewis.models.model import Model, TensorInfo, View
from lewis.models.names import EMBEDDINGS, HEADS, NUMBER, PER_TOKEN, layer_of

_BEFORE = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|shared|project_in)(\.|$)")
_AFTER = re.compile(r"embedding_norm")  # LFM2's last norm


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a model.

    Attributes:
        prefix: what comes before the number in the names of their tensors, with the dot.
        count: how many there are.
        tensors: of each layer, what comes after the number; in the order of the checkpoint.
        before, after: the other tensors: those that the first layer's input comes from, other towers and projectors
            among them, and those that come after the last one's output.
    """

    prefix: str
    count: int
    tensors: tuple[tuple[str, ...], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    def name(self, layer: int, suffix: str) -> str:
        """Return the full name of a tensor of a layer."""
        return f"{self.prefix}{layer}.{suffix}"

    def number(self, name: str) -> int | None:
        """The number of the layer that a tensor is in; None outside of these layers."""
        return layer_of(name.removeprefix(self.prefix)) if name.startswith(self.prefix) else None


def layers_of(ref: str, names: Iterable[str]) -> Layers:
    """Find the stack of layers by the names of a model's tensors.

    Of several stacks (towers of images or sound next to a language model) it is the one with an embedding of tokens
    next to it.

    Raises:
        InputError: if there is none, if a layer is missing, or if it is not clear which one text goes through alone.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    outside = []
    for name in names:
        match = NUMBER.search(name)
        if match is None:
            outside.append(name)
        else:
            stacks.setdefault(name[: match.start(1)], {}).setdefault(int(match[1]), []).append(name[match.end() :])
    prefix = _of_text(list(stacks), outside)
    if prefix is None:
        found = ", ".join(f"{prefix}*" for prefix in stacks) or "no numbered layers"
        raise InputError(
            f"{ref}: slices need a model with one stack of layers, or one that is a language model's next to other "
            f"towers, got {found}; list the models under `models`, and give layers their own values by filters or "
            "gradients"
        )
    layers = stacks.pop(prefix)
    if set(layers) != set(range(len(layers))):
        gap = min(set(range(len(layers))) - set(layers))
        raise InputError(f"{ref}: its tensors are of {len(layers)} layers, but none is of layer {gap}")
    towers = [f"{prefix}{i}.{name}" for prefix, each in stacks.items() for i, below in each.items() for name in below]
    ends = [name for name in outside if _comes_after(name, prefix, towers)]
    return Layers(
        prefix,
        len(layers),
        tuple(tuple(layers[i]) for i in range(len(layers))),
        tuple(name for name in [*outside, *towers] if name not in ends),
        tuple(ends),
    )


def _of_text(stacks: Sequence[str], outside: Sequence[str]) -> str | None:
    """The prefix of the stack that text goes through; None if there is none, or several (encoder and decoder)."""
    if len(stacks) == 1:
        return stacks[0]
    found = [each for each in stacks if any(f"{_parent(each)}{name}" in outside for name in EMBEDDINGS)]
    if len(found) != 1:
        return None
    whole, decoder, _ = _parent(found[0]).rpartition("decoder.")
    return None if decoder and any(each.startswith(f"{whole}encoder.") for each in stacks) else found[0]


def _parent(prefix: str) -> str:
    """The module path that a stack is in: `model.` of `model.layers.`; empty for `layers.`."""
    module, dot, _ = prefix.removesuffix(".").rpartition(".")
    return module + dot


def _comes_after(name: str, prefix: str, towers: Sequence[str]) -> bool:
    """Whether a tensor outside of the layers belongs to the output: it is the language model's, and no embedding."""
    embeds = _BEFORE.search(name) and not _AFTER.search(name)
    if embeds and not name.endswith(HEADS):
        return False
    parent = _parent(prefix)
    depth = parent.count(".")
    in_tower = any(name.split(".")[: depth + 1] == each.split(".")[: depth + 1] for each in towers)
    return not towers or name.endswith(PER_TOKEN) or (name.startswith(parent) and not in_tower)


def other_depth(one: Model, other: Model) -> bool:
    """Whether two models have different numbers of layers."""
    depths = [layers_of(str(model.folder), [*model.tensors, *model.tied]).count for model in (one, other)]
    return depths[0] != depths[1]


def as_source(tensor: str, moved: int) -> str:
    """Return the name of a layer's tensor in a model where the layer's number is greater by `moved`; others stay."""
    return NUMBER.sub(lambda match: match[0].replace(match[1], str(int(match[1]) + moved)), tensor, count=1)


class Restacked(View):
    """A part of a model under other names; reads like a `Checkpoint`.

    Attributes:
        model: the model.
        names: name -> the name in the model.
        folder, key, config: those of the model.
        tensors: name -> dtype and shape.
        tied: empty; a tied head among the names is read from the embedding.
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
        """Return one tensor's dtype and bits, as the model has them."""
        return self.model.raw(self.names[name])

    def _sources(self, name: str) -> tuple[str]:
        return (self.names[name],)


def own_head(model: Model) -> str | None:
    """The name of a head that is a weight of its own and differs from the embedding; None if there is none."""
    heads = [name for name in model.tensors if name.endswith(HEADS)]
    embeddings = [name for name in model.tensors if name.endswith(EMBEDDINGS)]
    for head in heads:
        if not any(same_tensor(model, head, embedding) for embedding in embeddings):
            return head
    return None


def same_tensor(model: Model, one: str, other: str) -> bool:
    """Whether two tensors of a model have the same dtype, shape and bits."""
    if model.tensors[one].shape != model.tensors[other].shape:
        return False
    (kind, bits), (other_kind, other_bits) = model.raw(one), model.raw(other)
    return kind == other_kind and same_bits(bits, other_bits)
