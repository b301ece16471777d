"""Conversions of transformers that do more than cut, join and stack along rows: done, and undone, when read.

Only operations that move values are used, never one that rounds, pads or drops some.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lewis.lazy_torch import torch
from lewis.models.placing import Shapes, operations_of
from lewis.models.segments import Layout, Role, Run

_MOVES = frozenset(
    (
        *("Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose"),
        *("PermuteForRope", "Conv3dToLinear", "LinearToConv3d", "Inkling2LoopMergeMessageQueries"),
        *("ErnieFuseAndSplitTextVisionExperts", "ErnieSplitAndDecoupleTextVisionExperts"),
    )
)

Read = Callable[[str], "torch.Tensor"]


class Conversions:
    """Makes the base's tensors of another model's by way of the network's parameters."""

    def __init__(self, base: Layout, model: Layout) -> None:
        self._ours, self._theirs = base, model
        self._own: dict[Role, str] = {role: tensor for tensor, role in base.roles.items()}

    def sources(self, name: str, shape: tuple[int, ...], shapes: Shapes) -> tuple[str, ...]:
        """The model's tensors that a tensor of the base is made of; none if it cannot be made. Nothing is read.

        Args:
            name: the base's tensor.
            shape: its shape.
            shapes: of the model's tensors.
        """
        asked: dict[str, None] = {}

        def read(tensor: str) -> torch.Tensor:
            asked[tensor] = None
            return torch.empty(shapes[tensor], device="meta")

        try:
            made = self.make(name, read)
        except (RuntimeError, ValueError, IndexError, AttributeError):  # shapes that no conversion takes
            return ()
        fits = name in made and (name in self._ours.runs or tuple(made[name].shape) == shape)
        return tuple(asked) if fits else ()

    def make(self, name: str, read: Read) -> dict[str, torch.Tensor]:
        """A tensor of the base, perhaps flat, and others that come with it; empty if it cannot be made.

        Args:
            name: the base's tensor.
            read: the model's tensor -> its value.
        """
        if name not in self._ours.runs:
            return self._reverted(name, read)
        parts = []
        for run in self._ours.runs[name]:
            parameter = self._parameter(run.name, read)
            if parameter is None:
                return {}
            parts.append(parameter.reshape(-1)[run.start : run.stop])
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0]}

    def _parameter(self, name: str, read: Read) -> torch.Tensor | None:
        """A parameter of the network, made of the model's tensors; None if it cannot be made."""
        shape = self._theirs.placing.state[name].shape
        runs = self._theirs.tensors_of(Run(name, 0, shape.numel()))
        if runs is not None:
            parts = [read(run.name).reshape(-1)[run.start : run.stop] for run in runs]
            return torch.cat(parts).reshape(shape)
        converter = self._theirs.placing.converters.get(name)
        if converter is None or not _only_moves(converter):
            return None
        return self._theirs.placing.value(name, read)

    def _reverted(self, name: str, read: Read) -> dict[str, torch.Tensor]:
        role = self._ours.roles.get(name)
        placing = self._ours.placing
        converter = placing.converters.get(role[0]) if role else None
        if role is None or converter is None or not _only_moves(converter):
            return {}
        back, first = copy.deepcopy(converter.reverse_transform()), ""
        for parameter in (each for each, of in placing.firsts.items() if of == role[0]):
            value, (called, pattern) = self._parameter(parameter, read), back.rename_source_key(parameter)
            if value is None or pattern is None:
                return {}
            first = first or called
            back.add_tensor(first, parameter, pattern, lambda value=value: value)
        made = back.convert(first, model=placing.module, config=placing.module.config)
        made = {each: value[0] if isinstance(value, list) else value for each, value in made.items()}
        roles = Layout(placing.module, {each: tuple(value.shape) for each, value in made.items()}).roles
        return {self._own[its]: made[each] for each, its in roles.items() if its in self._own}


def _only_moves(converter: Any) -> bool:
    return all(name in _MOVES for name, _ in operations_of(converter))
