"""Find the places of a checkpoint's tensors in a network, by transformers' own tables of renaming and conversion.

Checkpoints of one model differ in how its weights are cut: every expert a tensor, or all of a layer in one; q, k and v
apart or joined. Where a conversion of transformers only stacks, joins or cuts tensors along their rows, each tensor is
a run of the flat values of a parameter, or several runs one after another (`Layout`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lewis import private_names
from lewis.lazy_torch import torch
from lewis.models.names import HEADS, Shapes

Read = Callable[[str], "torch.Tensor"]
Role = tuple[str, str | None, int]
"""A tensor's role in a network: the first parameter that it becomes, the conversion's pattern, its number for that."""

_MOVES = frozenset(  # operations of conversions that move values, and never round, pad or drop some
    (
        *("Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose"),
        *("PermuteForRope", "Conv3dToLinear", "LinearToConv3d", "Inkling2LoopMergeMessageQueries"),
        *("ErnieFuseAndSplitTextVisionExperts", "ErnieSplitAndDecoupleTextVisionExperts"),
    )
)


class Placing:
    """The parameters (and saved buffers) of a network, and the checkpoint tensors that each is made of.

    Attributes:
        sources: parameter -> the tensors that it is made of, each with the pattern of the conversion that it matched;
            None: it is the parameter, value by value.
        converters: parameter -> the conversion that makes it.
        firsts: parameter -> the first of the parameters that its tensors are converted to.
    """

    def __init__(self, module: Any, tensors: Shapes) -> None:
        """Find the parameter of each tensor."""
        self.module = module
        self.state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        self.sources: dict[str, list[tuple[str, str | None]]] = {}
        self.converters: dict[str, Any] = {}
        self.firsts: dict[str, str] = {}
        renamings, converters = _conversions(module)
        of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        for tensor in sorted(tensors, key=natural):
            name, pattern = (tensor, None) if tensor in self.state else self._renamed(tensor, renamings, converters)
            if name not in self.state:
                continue
            targets = [name] if pattern is None else self._targets(name, of_pattern[pattern])
            for target in targets:
                self.sources.setdefault(target, []).append((tensor, pattern))
                if pattern is not None:
                    self.converters[target], self.firsts[target] = of_pattern[pattern], name

    def value(self, parameter: str, read: Read) -> torch.Tensor:
        """Make a parameter from the checkpoint's tensors."""
        found = self.sources[parameter]
        converter = self.converters.get(parameter)
        if converter is None:
            return read(found[0][0])
        made, first = copy.deepcopy(converter), self.firsts[parameter]
        for tensor, pattern in found:
            made.add_tensor(first, tensor, pattern, lambda tensor=tensor: read(tensor))
        values = made.convert(first, model=self.module, config=self.module.config)[parameter]
        return values[0] if isinstance(values, list) else values

    def _targets(self, name: str, converter: Any) -> list[str]:
        """All parameters that a tensor is converted to; `name` is the first."""
        first, *others = converter.target_patterns
        return [name, *(each for other in others if (each := name.replace(first, other)) in self.state)]

    def _renamed(self, tensor: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        rename, prefix = private_names.RENAME_KEY.get(), self.module.base_model_prefix
        found: tuple[str, str | None] = rename(tensor, renamings, converters, prefix, self.state)
        return found if found[0] in self.state else rename(tensor, [], [], prefix, self.state)


def untie(module: Any, tensors: Shapes) -> None:
    """Give the head of a network a weight of its own if the class ties it by default, and the model does not.

    Args:
        module: the network, on the meta device; it is changed.
        tensors: name -> shape in the checkpoint, without tied names.
    """
    if not any(name.endswith(HEADS) for name in tensors):
        return
    head, used = module.get_output_embeddings(), Placing(module, tensors).sources
    weight: Any = getattr(head, "weight", None)
    names = [name for name, value in module.state_dict(keep_vars=True).items() if value is weight and name in used]
    if len(names) > 1 and any(name.endswith(HEADS) for name in names):
        head.weight = torch.nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares numbers in a name by their value: experts are stacked in this order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def operations_of(converter: Any) -> Sequence[tuple[str, int | None]]:
    """Return the name and dimension of each operation of a conversion."""
    return [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]


def only_moves(converter: Any) -> bool:
    """Whether a conversion moves values, and never rounds, pads or drops some."""
    return all(name in _MOVES for name, _ in operations_of(converter))


def _conversions(network: Any) -> tuple[list[Any], list[Any]]:
    from transformers import WeightConverter

    found, renaming = private_names.CONVERSIONS.get()(network), private_names.WEIGHT_RENAMING.get()
    return [e for e in found if isinstance(e, renaming)], [e for e in found if isinstance(e, WeightConverter)]


@dataclass(frozen=True)
class Run:
    """Elements `start` to `stop` (exclusive) of the flat values of a parameter or a tensor."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


class Layout:
    """How a checkpoint holds the parameters of a network.

    Attributes:
        placing: the parameter of each tensor.
        runs: tensor -> the runs of parameters that it holds, in its own order. Not of tensors that a conversion changes
            otherwise, nor of those whose shapes do not fit the network.
        roles: tensor -> its role; not of tensors that the network has no place for.
        by_role: role -> the tensor that has it.
    """

    def __init__(self, module: Any, tensors: Shapes) -> None:
        """Find the runs and roles of a checkpoint's tensors in a network."""
        self.placing, self._shapes = Placing(module, tensors), tensors
        self.runs: dict[str, tuple[Run, ...]] = dict(self._find())
        self.roles = self._find_roles()
        self.by_role = {role: tensor for tensor, role in self.roles.items()}
        held: dict[str, list[tuple[int, int, str, int]]] = {}
        for tensor, runs in self.runs.items():
            offset = 0
            for run in runs:
                held.setdefault(run.name, []).append((run.start, run.stop, tensor, offset))
                offset += run.size
        self._held = {name: sorted(found) for name, found in held.items()}

    def tensors_of(self, wanted: Run) -> list[Run] | None:
        """Return the runs of the checkpoint's tensors that make a run of a parameter; None if it lacks some of it."""
        found, place = [], wanted.start
        for start, stop, tensor, offset in self._held.get(wanted.name, ()):
            if start <= place < stop:
                end = min(stop, wanted.stop)
                found.append(Run(tensor, offset + place - start, offset + end - start))
                place = end
        return found if place == wanted.stop and found else None

    def elements(self, parameter: str) -> int:
        """Return the number of elements of a parameter of the network."""
        return self.placing.state[parameter].numel()

    def _find_roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {}
        for parameter, found in self.placing.sources.items():
            first, count = self.placing.firsts.get(parameter, parameter), dict[str | None, int]()
            for tensor, pattern in found:
                number = count[pattern] = count.get(pattern, -1) + 1
                roles.setdefault(tensor, (first, pattern, number))
        return roles

    def _find(self) -> Iterator[tuple[str, tuple[Run, ...]]]:
        for parameter, found in self.placing.sources.items():
            converter = self.placing.converters.get(parameter)
            if converter is None:
                for tensor, _ in found[:1]:
                    if self._shapes[tensor] == tuple(self.placing.state[parameter].shape):
                        yield tensor, (Run(parameter, 0, self.elements(parameter)),)
            elif self.placing.firsts[parameter] == parameter:
                yield from self._converted(parameter, converter, found)

    def _converted(
        self, parameter: str, converter: Any, found: list[tuple[str, str | None]]
    ) -> Iterator[tuple[str, tuple[Run, ...]]]:
        operations, shape = operations_of(converter), tuple(self.placing.state[parameter].shape)
        of_pattern: dict[str | None, list[str]] = {pattern: [] for pattern in converter.source_patterns}
        for tensor, pattern in found:
            of_pattern[pattern].append(tensor)
        groups = [group for group in of_pattern.values() if group]
        if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            alike = all(len({self._shapes[tensor] for tensor in group}) == 1 for group in groups)
            if alike and {len(group) for group in groups} == {shape[0]}:
                in_order = [tensor for each in zip(*groups, strict=True) for tensor in each]
                yield from self._joined(parameter, in_order, shape[2:])
        elif operations == [("Concatenate", 0)]:
            yield from self._joined(parameter, [tensor for group in groups for tensor in group], shape[1:])
        elif operations in ([("Chunk", 0)], [("Split", 0)]) and len(found) == 1:
            yield from self._cut(found[0][0], converter)

    def _joined(
        self, parameter: str, tensors: list[str], inner: tuple[int, ...]
    ) -> Iterator[tuple[str, tuple[Run, ...]]]:
        """Yield the runs of tensors one after another in a parameter; `inner` are their dimensions after the first."""
        shapes = [self._shapes[tensor] for tensor in tensors]
        if sum(map(prod, shapes)) != self.elements(parameter) or any(each[1:] != inner for each in shapes):
            return
        place = 0
        for tensor, shape in zip(tensors, shapes, strict=True):
            yield tensor, (Run(parameter, place, place + prod(shape)),)
            place += prod(shape)

    def _cut(self, tensor: str, converter: Any) -> Iterator[tuple[str, tuple[Run, ...]]]:
        """Yield the runs of a tensor that is cut along its rows into parameters."""
        first = next(name for name, found in self.placing.sources.items() if found[0][0] == tensor)
        names = [name for name, of in self.placing.firsts.items() if of == first]
        state, shape = self.placing.state, self._shapes[tensor]
        sizes = [state[name].numel() for name in names]
        equal = operations_of(converter) != [("Chunk", 0)] or len(set(sizes)) == 1
        inner = all(tuple(state[name].shape[1:]) == shape[1:] for name in names)
        if len(names) == len(converter.target_patterns) and sum(sizes) == prod(shape) and equal and inner:
            yield tensor, tuple(Run(name, 0, size) for name, size in zip(names, sizes, strict=True))
