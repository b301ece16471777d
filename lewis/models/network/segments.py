"""Which tensors of a checkpoint hold which elements of a network's parameters.

Checkpoints of one model differ in how its weights are cut: every expert a tensor, or all of a layer in one; q, k and v
apart or joined. Where a conversion of transformers only stacks, joins or cuts tensors along their rows, each tensor is
a run of the flat values of a parameter, or several runs one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from lewis.models.names import Shapes
from lewis.models.network.placing import Placing, operations_of

Role = tuple[str, str | None, int]
"""A tensor's role in a network: the first parameter that it becomes, the conversion's pattern, its number for that."""


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
