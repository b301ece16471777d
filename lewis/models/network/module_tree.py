"""The module tree of a model: its repeated blocks, the projections in them, and their tensors in the checkpoint.

Nothing is looked up by architecture. A block is an item of an outermost `nn.ModuleList`; a projection is a linear
module (also GPT-2's `Conv1D`, which stores in x out) or a parameter of three dimensions (stacked experts) in a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

from lewis.lazy_torch import nn, torch
from lewis.models.names import Shapes, short_or_whole
from lewis.models.network.layouts import (
    Rows,
    below_block,
    keeps_inputs,
    only_stacks,
    parts_of,
    stacked_in,
    stored_in_out,
    weights,
)
from lewis.models.network.network_class import build, input_embeddings, lists_of_blocks, text_tower
from lewis.models.network.placing import Placing, operations_of, untie


@dataclass(frozen=True)
class Layer:
    """A covered layer: the unit whose importance is measured.

    Attributes:
        tensor: name of its tensor in the checkpoint.
        index: number of its block, l.
        projection: its type, c (`self_attn.q_proj`), after the path of its blocks if these are of several kinds.
        parameters: number of weights.
        part: which part of a fused tensor (`q` of `qkv_proj`); empty if it is the whole tensor.
    """

    tensor: str
    index: int
    projection: str
    parameters: int
    part: str = ""

    @property
    def key(self) -> str:
        """The key that its importance is stored under: the tensor, and the part in brackets."""
        return f"{self.tensor}[{self.part}]" if self.part else self.tensor


def projection_names(projections: Sequence[str]) -> list[str]:
    """What to call projections in tables: the last part of each, or all of it where that would be ambiguous."""
    return short_or_whole([name.rpartition(".")[2] for name in projections], projections)


@dataclass(frozen=True)
class Covered:
    """A checkpoint tensor of a projection, and where its values are in the network.

    Attributes:
        layers: the layer, or one for each part of a fused tensor.
        rows: output rows of each layer, None for all.
        parameter: full name of the network's parameter.
        expert: which of the stacked experts the tensor is, None if it is the whole parameter.
        transposed: whether the weight is stored (in, out).
        stack: how many matrices lie one after another in its rows, if these have inputs of their own; 0 if none do.
    """

    tensor: str
    layers: tuple[Layer, ...]
    rows: tuple[Rows | None, ...]
    parameter: str
    expert: int | None = None
    transposed: bool = False
    stack: int = 0


class Network:
    """A model on the meta device, whose parameters are read from a checkpoint when they are needed.

    Attributes:
        module: the transformers model.
        tower: the part of it that text goes through.
        blocks: path -> block of the tower, in the order of the forward pass.
        covered: the covered tensors.
    """

    def __init__(self, folder: Path, tensors: Shapes | None, dtype: torch.dtype) -> None:
        """Build the tree; no weight is read.

        Args:
            folder: of the model, with its config.json.
            tensors: name -> shape in the checkpoint, without tied names; None: as the network names them.
            dtype: that a forward pass computes in.

        Raises:
            InputError: if the class is unknown or needs code that comes with the model.
        """
        self.folder = folder
        self.module = build(folder, dtype)
        if tensors is not None:
            untie(self.module, tensors)
        self.tower = text_tower(self.module)
        inside = {id(module) for module in self.tower.modules()}
        self._lists = lists_of_blocks(self.module)
        lists = {name: each for name, each in self._lists.items() if id(each) in inside}
        self.blocks = {f"{name}.{i}": block for name, each in lists.items() for i, block in enumerate(each)}
        self._state = self.module.state_dict(keep_vars=True)
        self._names: dict[int, list[str]] = {}
        for name, value in self._state.items():
            self._names.setdefault(id(value), []).append(name)
        if tensors is None:
            tensors = {name: tuple(value.shape) for name, value in self._state.items()}
        self._placing = Placing(self.module, tensors)
        self.covered = tuple(self._find_covered(tensors))

    @property
    def encodes(self) -> bool:
        """Whether the model is an encoder with a decoder."""
        return bool(getattr(self.module.config, "is_encoder_decoder", False))

    @property
    def looks_ahead(self) -> bool:
        """Whether some attention sees later tokens, too (BERT, EmbeddingGemma)."""
        modules = [module for block in self.blocks.values() for module in block.modules()]
        causal = [module.is_causal for module in modules if hasattr(module, "is_causal")]
        if causal:
            return not all(causal)
        config = self.module.config.get_text_config()
        asked = "is_decoder" in signature(self.tower.forward).parameters  # BLIP, whose head asks for it
        return asked or getattr(config, "is_decoder", True) is False

    @property
    def predicts_next_token(self) -> bool:
        """Whether the model predicts each token from those before it."""
        return not (self.encodes or self.looks_ahead)

    def sources(self, parameter: str) -> list[str]:
        """Return the checkpoint tensors that a parameter (or buffer) is made of; none if the checkpoint lacks it."""
        return [tensor for tensor, _ in self._placing.sources.get(parameter, [])]

    @property
    def parameters(self) -> list[str]:
        """Full names of all parameters and saved buffers."""
        return list(self._state)

    @cached_property
    def unconverted(self) -> dict[str, str]:
        """The checkpoint tensors that are a parameter, value by value, without conversion: tensor -> parameter."""
        single = {found[0][0]: name for name, found in self._placing.sources.items() if len(found) == 1}
        return {tensor: name for tensor, name in single.items() if name not in self._placing.converters}

    def value(self, parameter: str, read: Any) -> torch.Tensor:
        """Make a parameter from the checkpoint's tensors."""
        return self._placing.value(parameter, read)

    def computed(self, parameter: str) -> torch.Tensor | None:
        """A parameter that no checkpoint stores, since its module computes it (a table of sines); None for others."""
        path, _, leaf = parameter.rpartition(".")
        create = getattr(self.module.get_submodule(path), "create_weight", None)
        return create() if create and leaf == "weight" else None

    def parameters_in(self, path: str) -> list[str]:
        """Names of the parameters and saved buffers under a module."""
        return [name for name in self._state if name.startswith(f"{path}.")]

    def parameters_outside(self, *, with_head: bool = False) -> list[str]:
        """Names of the parameters and saved buffers that are in no block.

        Args:
            with_head: whether to include those of the head that makes logits. Parameters that it shares always are.
        """
        head, used = self.module.get_output_embeddings(), input_embeddings(self.module)
        heads = tuple(f"{path}." for path, module in self.module.named_modules() if module is head is not used)
        inside = tuple(f"{path}." for path in self._lists)

        def of_head(name: str) -> bool:
            return name.startswith(heads)

        return [
            name
            for name in self._state
            if not name.startswith(inside) and (with_head or not all(map(of_head, self.same(name))))
        ]

    def read_by_row(self, *, with_head: bool = False) -> list[str]:
        """Return all names of the input embedding, if a pass reads only the rows for the tokens of its input.

        Empty if it is not exactly one tensor of the checkpoint, or something else than an embedding reads it, too.

        Args:
            with_head: whether the head that makes logits runs, too.
        """
        head, used = self.module.get_output_embeddings(), input_embeddings(self.module)
        path = next((path for path, module in self.module.named_modules() if module is used), None)
        names = self.same(f"{path}.weight") if f"{path}.weight" in self._state else []
        users = [self.module.get_submodule(name.rpartition(".")[0]) for name in names]
        whole = any(not isinstance(each, nn.Embedding) and (with_head or each is not head) for each in users)
        return [] if whole or not set(names) & set(self.unconverted.values()) else names

    def same(self, parameter: str) -> list[str]:
        """Return all names of a parameter: several if it is tied."""
        return self._names[id(self._state[parameter])]

    def is_parameter(self, name: str) -> bool:
        """Whether a name is that of a parameter, not of a saved buffer."""
        return isinstance(self._state[name], nn.Parameter)

    def empty(self, parameter: str) -> torch.Tensor:
        """The parameter on the meta device, without its values."""
        return self._state[parameter]

    def _find_covered(self, tensors: Shapes) -> Iterator[Covered]:
        found = [
            (path, f"{path}.{name}".rstrip("."), module)
            for path, block in self.blocks.items()
            for name, module in block.named_modules()
        ]
        projections = [(p, n, m, w) for p, n, m in found for w in weights(m)]
        kinds = {path.rpartition(".")[0] for path, *_ in projections}
        split = self._split(found)
        for path, name, module, weight in projections:
            parameter, (kind, _, index) = f"{name}.{weight}", path.rpartition(".")
            prefix = f"{kind}." if len(kinds) > 1 else ""
            below = prefix + parameter.removeprefix(f"{path}.").removesuffix(".weight")
            for tensor, pattern in self._placing.sources.get(parameter, []):
                shape = tensors[tensor]
                if pattern is None:
                    layer = Layer(tensor, int(index), below, prod(shape))
                    if count := stacked_in(module).get(weight):
                        yield Covered(tensor, (layer,), (None,), parameter, transposed=weight == "w2", stack=count)
                    else:
                        yield _in_parts(layer, shape, parameter, module, self.module.config)
                    continue
                layer = Layer(tensor, int(index), prefix + below_block(tensor), prod(shape))
                converter = self._placing.converters[parameter]
                first = parameter == self._placing.firsts[parameter]
                if tensor in split:
                    if first:
                        yield self._in_split(layer, shape, split[tensor])
                elif kept := keeps_inputs(converter, self._state[parameter].dim()):
                    if first or kept == "joined":
                        yield Covered(tensor, (layer,), (None,), parameter)
                elif only_stacks(converter):  # any other conversion mixes tensors: what is not covered is reported
                    stack = [each for each, of in self._placing.sources[parameter] if of == pattern]
                    yield Covered(tensor, (layer,), (None,), parameter, stack.index(tensor))

    def _split(self, found: Sequence[tuple[str, str, nn.Module]]) -> dict[str, list[str]]:
        """Find the tensors that are cut by rows into weights of linear modules; these share their inputs."""
        linear = {f"{name}.weight" for _, name, module in found if isinstance(module, nn.Linear)}
        parts: dict[str, list[str]] = {}
        for name, converter in self._placing.converters.items():
            if len(converter.target_patterns) > 1 and operations_of(converter) in ([("Chunk", 0)], [("Split", 0)]):
                parts.setdefault(self._placing.sources[name][0][0], []).append(name)
        return {tensor: names for tensor, names in parts.items() if linear.issuperset(names)}

    def _in_split(self, layer: Layer, shape: tuple[int, ...], names: Sequence[str]) -> Covered:
        """Cover a tensor that is cut along its rows into these weights, with a layer for each of them."""
        layers, rows, start = [], [], 0
        for name in names:
            count, part = self._state[name].shape[0], name.split(".")[-2]
            layers.append(_part_of(layer, part, count * shape[1]))
            rows.append(Rows(start, count, shape[0]))
            start += count
        return Covered(layer.tensor, tuple(layers), tuple(rows), names[0])


def _in_parts(layer: Layer, shape: tuple[int, ...], parameter: str, module: nn.Module, config: Any) -> Covered:
    """Cover a tensor that is one parameter, with a layer for each part if it is fused."""
    transposed = type(module).__name__ == "Conv1D" or stored_in_out(module)
    outputs = shape[-1] if transposed else shape[-2]
    parts = parts_of(parameter, outputs, config)
    layers = [_part_of(layer, part, layer.parameters // outputs * rows.count) for part, rows in parts.items()]
    return Covered(
        layer.tensor, tuple(layers) or (layer,), tuple(parts.values()) or (None,), parameter, transposed=transposed
    )


def _part_of(layer: Layer, part: str, parameters: int) -> Layer:
    return replace(layer, projection=f"{layer.projection}.{part}", parameters=parameters, part=part)
