"""Read a model whose weights have other names than the base's, or are cut otherwise, as if it had the base's tensors.

Versions of transformers name and cut the weights of one model differently (`h.0` and `transformer.h.0`, every expert a
tensor or all in one). The conversion tables of transformers say which parameter of the network a tensor is, or which
part of it. A tensor of the base that is a part of one of the model's is a view of the model's file. One that is made of
several is put together when it is read. A conversion that does more than cut, join and stack along rows is computed, in
either direction, when the tensor is read. Nothing is rounded, and no model is ever whole in memory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from lewis.lazy_torch import torch
from lewis.models.dtypes import as_tensor, bits_of
from lewis.models.model import Model, TensorInfo, View
from lewis.models.names import HEADS, PER_TOKEN, Shapes, in_layers
from lewis.models.network.network_class import known_network
from lewis.models.network.placing import Layout, Read, Run, only_moves

logger = logging.getLogger(__name__)
_WHOLE = -1  # as the end of a run: the tensor as it is, whatever its shape


@dataclass(frozen=True)
class Matched:
    """How the base's tensors are read from the tensors of a model.

    Attributes:
        runs: tensor of the base -> the runs of the model's tensors that make it, in order.
        shapes: tensor of the base -> its shape in the model; then those that only the model has.
        made: tensor of the base that a conversion makes -> the model's tensors that it takes.
        conversions: computes the tensors of `made`.
    """

    runs: Mapping[str, tuple[Run, ...]]
    shapes: Shapes
    made: Mapping[str, tuple[str, ...]]
    conversions: Conversions

    @property
    def whole(self) -> dict[str, str]:
        """Tensor of the base -> the model's tensor that it is, value by value."""
        return {name: runs[0].name for name, runs in self.runs.items() if runs[0].stop == _WHOLE}

    @property
    def summary(self) -> str:
        """Which tensors are renamed, cut or joined when they are read, as a sentence."""
        whole = self.whole
        moved = [f"{own} as {name}" for name, own in whole.items() if own != name]
        cut = [name for name, runs in self.runs.items() if len(runs) == 1 and name not in whole]
        joined = [name for name, runs in self.runs.items() if len(runs) > 1]
        parts = [f"{len(moved)} tensors are renamed ({moved[0]})"] if moved else []
        parts += [f"{len(cut)} are cut out of larger ones ({self.runs[cut[0]][0].name} has {cut[0]})"] if cut else []
        if joined:
            parts.append(f"{len(joined)} are put together ({joined[0]} of {len(self.runs[joined[0]])})")
        if self.made:
            parts.append(f"{len(self.made)} are computed by transformers' conversion ({next(iter(self.made))})")
        return "read under the base's names: " + ", ".join(parts)


def differ(base: Shapes, model: Shapes) -> bool:
    """Whether a model may have the base's weights under other names: one of them has tensors that the other lacks.

    Heads do not count, since they may be tied and not stored; nor do tensors of the model outside of its layers.
    """
    missing = any(name not in model and not name.endswith(HEADS) for name in base)
    reshaped = any(n in model and base[n] != model[n] and not n.endswith(PER_TOKEN) for n in base)
    return missing or reshaped or bool(in_layers(name for name in model if name not in base))


def match(home: Path, base: Shapes, model: Shapes) -> Matched | None:
    """Find the tensors of a base, whose folder is `home`, in a model by transformers' tables; no weight is read.

    Returns:
        How they are read from the model; None if it has the base's names, or transformers knows no other names.
    """
    if not differ(base, model):
        return None
    module = known_network(home)
    if module is None:
        return None
    ours, theirs = Layout(module, base), Layout(module, model)
    runs: dict[str, tuple[Run, ...]] = {}
    made, conversions = dict[str, tuple[str, ...]](), Conversions(ours, theirs)
    for name, shape in base.items():
        same = theirs.by_role.get(ours.roles[name]) if name in ours.roles else name if name in model else None
        if same is not None and (model[same] == shape or name.endswith(PER_TOKEN)):
            runs[name] = (Run(same, 0, _WHOLE),)
        elif found := _runs(name, ours, theirs):
            runs[name] = found
        elif sources := conversions.sources(name, shape, model):
            made[name] = sources
    if not made and all(each == (Run(name, 0, _WHOLE),) for name, each in runs.items()):
        return None
    used = {run.name for each in runs.values() for run in each} | {name for each in made.values() for name in each}
    shapes = {n: model[r[0].name] if r[0].stop == _WHOLE else base[n] for n, r in runs.items()}
    shapes |= {name: base[name] for name in made}
    used |= shapes.keys()
    others = {name: shape for name, shape in model.items() if name not in used}
    return Matched(runs, shapes | others, made, conversions)


def _runs(name: str, ours: Layout, theirs: Layout) -> tuple[Run, ...]:
    """The runs of the model's tensors that make a tensor of the base; empty if they do not make all of it."""
    found = [theirs.tensors_of(run) for run in ours.runs.get(name, ())]
    return tuple(run for each in found for run in each or ()) if all(found) else ()


def with_tied(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model, tied names included."""
    shapes = model.shapes
    return shapes | {name: shapes[stored] for name, stored in model.tied.items() if stored in shapes}


class Renamed(View):
    """A model under the base's names; reads like a `Checkpoint`.

    Attributes:
        model: as it is stored.
        folder, config: the model's.
        key: as given.
        tensors: the base's names that the model has, then what only the model has.
        tied: the base's name of the head -> of the embedding, if the model ties them.
        summary: what is read otherwise than it is stored.
    """

    def __init__(self, model: Model, matched: Matched, key: str) -> None:
        """
        Args:
            model: to be read.
            matched: how the base's tensors are read from it, by `match`.
            key: identity of what is read.
        """
        self.model, self.folder, self.config, self.key = model, model.folder, model.config, key
        self.summary, self._runs, self._made = matched.summary, dict(matched.runs), matched.made
        self._conversions = matched.conversions
        self._kept: dict[str, tuple[str, np.ndarray]] = {}
        self._lock = Lock()
        logger.info("%s: %s", model.folder, self.summary)
        names = {own: name for name, own in matched.whole.items()}
        self.tied = {names.get(head, head): names[of] for head, of in model.tied.items() if of in names}
        for head in self.tied:
            self._runs.pop(head, None)
        self.tensors = {
            name: self._info(name, shape) for name, shape in matched.shapes.items() if name not in self.tied
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype of `raw`."""
        dtype, bits = self.raw(name)
        return as_tensor(dtype, bits.copy()).reshape(self.tensors[self.tied.get(name, name)].shape)

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Return one tensor's dtype and bits, as `Checkpoint.raw`: a view of the file if one tensor there holds it all.

        A tensor that is put together from tensors of several dtypes is in fp32.
        """
        if (stored := self.tied.get(name, name)) in self._made:
            return self._converted(stored)
        parts = [self._bits(run) for run in self._of(name)]
        if len(parts) == 1:
            return parts[0]
        if len({dtype for dtype, _ in parts}) == 1:
            return parts[0][0], np.concatenate([bits for _, bits in parts])
        values = [as_tensor(dtype, bits.copy()).float().numpy() for dtype, bits in parts]
        return "F32", np.concatenate(values).view(np.uint32)

    def computes(self, name: str) -> bool:
        """Whether a tensor is put together or computed, and so takes memory while it is used."""
        return len(self._sources(name)) > 1 or name in self._made or super().computes(name)

    def _of(self, name: str) -> tuple[Run, ...]:
        name = self.tied.get(name, name)
        return self._runs.get(name, (Run(name, 0, _WHOLE),))

    def _sources(self, name: str) -> list[str]:
        name = self.tied.get(name, name)
        return list(self._made[name]) if name in self._made else [run.name for run in self._of(name)]

    def _converted(self, name: str) -> tuple[str, np.ndarray]:
        """Return a tensor that a conversion makes. The last conversion's tensors are all kept, since one makes many."""
        with self._lock:
            if name not in self._kept:
                made = self._conversions.make(name, self.model.read)
                self._kept = {each: bits_of(value) for each, value in made.items()}
            return self._kept[name]

    def _bits(self, run: Run) -> tuple[str, np.ndarray]:
        """The dtype and bits of a run. A computed tensor is kept for its further runs, until another is computed."""
        if not self.model.computes(run.name):
            dtype, bits = self.model.raw(run.name)
        else:
            with self._lock:
                if run.name not in self._kept:
                    self._kept = {run.name: self.model.raw(run.name)}
                dtype, bits = self._kept[run.name]
        return dtype, bits if run.stop == _WHOLE else bits[run.start : run.stop]

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        dtypes = {self.model.tensors[self.model.tied.get(each, each)].dtype for each in self._sources(name)}
        return TensorInfo(dtypes.pop() if len(dtypes) == 1 else "F32", shape)


class Conversions:
    """Computes the base's tensors from another model's, by way of the network's parameters."""

    def __init__(self, base: Layout, model: Layout) -> None:
        self._ours, self._theirs = base, model

    def sources(self, name: str, shape: tuple[int, ...], shapes: Shapes) -> tuple[str, ...]:
        """Return the model's tensors that one of the base is made of; none if it cannot be made. Nothing is read."""
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
        """Compute a tensor of the base, perhaps flat, and others of the same conversion; empty if it cannot be made."""
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
        """Compute a parameter of the network from the model's tensors; None if it cannot be made."""
        shape = self._theirs.placing.state[name].shape
        runs = self._theirs.tensors_of(Run(name, 0, shape.numel()))
        if runs is not None:
            parts = [read(run.name).reshape(-1)[run.start : run.stop] for run in runs]
            return torch.cat(parts).reshape(shape)
        converter = self._theirs.placing.converters.get(name)
        if converter is None or not only_moves(converter):
            return None
        return self._theirs.placing.value(name, read)

    def _reverted(self, name: str, read: Read) -> dict[str, torch.Tensor]:
        role = self._ours.roles.get(name)
        placing = self._ours.placing
        converter = placing.converters.get(role[0]) if role else None
        if role is None or converter is None or not only_moves(converter):
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
        own = self._ours.by_role
        return {own[its]: made[each] for each, its in roles.items() if its in own}
