"""PEFT LoRA adapters as experts. Weights that they change are computed when read; nothing is written to disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lewis.errors import InputError
from lewis.input_files import check_regular
from lewis.lazy_torch import torch
from lewis.models.dtypes import DTYPES, as_tensor
from lewis.models.files.folder import ADAPTER as WEIGHTS
from lewis.models.files.safetensors_file import TensorFile, same_bits
from lewis.models.lora.delta import AddedBias, Change, LowRank, NewRows, Replaced
from lewis.models.lora.question import CONFIG, question_of, read_settings
from lewis.models.model import Model, View
from lewis.rehearsal.answers import answers

logger = logging.getLogger(__name__)


def holds_adapter(files: Collection[str]) -> bool:
    """Whether a folder with these files is that of a PEFT adapter, not of a full model. It may have a config.json."""
    weights = [name for name in files if name.endswith((".safetensors", ".safetensors.index.json"))]
    return CONFIG in files and ("config.json" not in files or weights == [WEIGHTS])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a full model."""
    return folder.is_dir() and holds_adapter(os.listdir(folder))


@dataclass(frozen=True)
class Part:
    """A change of a tensor's flat values `start` to `stop`, by the values from `place` on of an adapter's weight.

    Attributes:
        whole: whether the adapter's weight is the tensor itself.
    """

    start: int
    stop: int
    change: Change
    place: int = 0
    whole: bool = True


class LoraExpert(View):
    """A model with a LoRA adapter on it; reads like a `Checkpoint`. What it changes is PEFT's answer (`question`).

    The delta of a module is `scale * B @ A` in fp32, with `scale = alpha / r`, or `alpha / sqrt(r)` for rsLoRA
    (arXiv 2312.03732); `alpha_pattern` and `rank_pattern` are followed. DoRA sets the norms too (`LowRank`). Modules
    that the adapter saves whole (`modules_to_save`), trained biases and trained rows of embeddings replace the base's,
    and so do embeddings that were resized for new tokens. Modules and parameters may have other names than the base's
    tensors, by transformers' tables of conversion.

    Attributes:
        base: the model that it is on: a checkpoint, or another adapter on one.
        folder: the adapter's folder.
        key: identity of base and adapter.
        config, tied: the base's.
        tensors: the base's; embeddings that the adapter resized have its shapes.
        unties: whether PEFT unties the base's head when it loads the adapter; both then have the same values.
        summary: how many of the base's tensors the adapter has other names for, as a sentence; empty if none.
    """

    def __init__(self, base: Model, folder: Path, key: str) -> None:
        """Open an adapter.

        Raises:
            Refused: if PEFT cannot load and merge it on this base, or no weights stand for it.
            InputError: if a file is missing, damaged or quantised.
        """
        self.base = self.model = base
        self.folder, self.key = folder, key
        self.config, self.tied = base.config, base.tied
        read_settings(folder)
        path = folder / WEIGHTS
        check_regular(path)
        if not path.is_file():
            raise InputError(f"{folder}: no {WEIGHTS}; expected the folder of a PEFT adapter saved with safetensors")
        self._file = TensorFile(path)
        if not self._file.places:
            raise InputError(f"{path}: holds no tensor; save the adapter again, or leave it out")
        for key_in_file, place in self._file.places.items():
            if place.dtype not in DTYPES or not DTYPES[place.dtype].floating:
                raise InputError(f"{path}: {key_in_file!r} is stored as {place.dtype}; save the adapter in float32")
        weights = {key_in_file: place.shape for key_in_file, place in self._file.places.items()}
        [answer] = answers([question_of(base.home, base.shapes, base.tied, folder, weights)])
        self._parts, self.summary, self.unties = self._read(answer["changes"]), "", answer["untied"]
        for said in answer["warnings"]:
            logger.warning("%s: PEFT says: %s", folder, said)
        if left := answer["unexpected"]:
            logger.warning(
                "%s: %d of its tensors are of no module that %s names, and are left out, as PEFT does: %s ...",
                *(path, len(left), CONFIG, left[0]),
            )
        if bare := answer["untouched"]:
            logger.warning("%s: has nothing for %d modules that %s names: %s ...", path, len(bare), CONFIG, bare[0])
        moved = [(row["parameter"], part[0]) for row in answer["changes"] for part in row["parts"]]
        if moved := [(name, tensor) for name, tensor in moved if name != tensor]:
            first = " in ".join(moved[0])
            self.summary = f"{len(moved)} of its changes are read under the base's names ({first})"
            logger.info("%s: %s", folder, self.summary)
        firsts = {name: parts[0] for name, parts in self._parts.items()}
        self._whole = {
            n: each.change.key for n, each in firsts.items() if each.whole and isinstance(each.change, Replaced)
        }
        self.tensors = {
            name: replace(info, shape=self._file.places[self._whole[name]].shape) if name in self._whole else info
            for name, info in base.tensors.items()
        }

    def _read(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Part]]:
        """The changes of each tensor of the base, in the order in which they are made.

        Raises:
            InputError: if the adapter has two values for a weight, such as for an embedding and the head tied to it.
        """
        found: dict[str, list[Part]] = {}
        for row in rows:
            change = self._change(row)
            for tensor, start, stop, place, whole in row["parts"]:
                first = found[tensor][0].change if tensor in found and whole else None
                if isinstance(first, Replaced) and isinstance(change, Replaced):
                    if not same_bits(self._file.bits(first.key), self._file.bits(change.key)):
                        raise InputError(
                            f"{self.folder / WEIGHTS}: {first.key!r} and {change.key!r} differ, and the base has "
                            f"{tensor!r} for both; merge it into its base with PEFT's merge_and_unload first"
                        )
                else:
                    found.setdefault(tensor, []).append(Part(start, stop, change, place, whole))
        return found

    def _change(self, row: Mapping[str, Any]) -> Change:
        shape = tuple(row["shape"])
        if row["kind"] == "whole":
            return Replaced(self._raw, row["key"], shape)
        if row["kind"] == "rows":
            return NewRows(self._raw, row["key"], tuple(row["ids"]), shape)
        if row["kind"] == "bias":
            return AddedBias(self._raw, row["key"], row["scale"], shape)
        names = ("a", "b", "scale", "transposed", "magnitude", "stack")
        return LowRank(self._raw, shape=shape, **{name: row[name] for name in names})

    def _raw(self, key: str) -> tuple[str, np.ndarray]:
        place = self._file.places[key]
        return place.dtype, self._file.bits(key).reshape(place.shape)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor: the base's, one that the adapter saves whole, or in fp32 one that it changes otherwise."""
        stored = self.tied.get(name, name)
        parts = self._parts.get(stored, [])
        if not parts:
            return self.base.read(name)
        changes = parts[1:] if stored in self._whole else parts
        whole = self._saved(self._whole[stored]) if stored in self._whole else self.base.read(name)
        if not changes:
            return whole
        [first, *others] = changes
        if not others and first.whole and isinstance(first.change, LowRank) and first.change.magnitude is None:
            return first.change.delta().reshape(whole.shape).add_(whole)  # fp32, added in place
        values = whole.to(torch.float32, copy=True).reshape(-1)
        for part in changes:
            part.change.apply(values[part.start : part.stop], part.place)
        return values.reshape(whole.shape)

    def factor(self, name: str) -> torch.Tensor | None:
        """Return a factor F of a weight's delta D, shape (out, in), with F^T F = D^T D.

        Returns:
            fp32 (rank, in); None if the weight is not the base's with one plain low-rank delta.
        """
        parts = self._parts.get(self.tied.get(name, name), [])
        if len(parts) != 1 or not parts[0].whole or not isinstance(parts[0].change, LowRank):
            return None
        return parts[0].change.factor()

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype and bits, as `Checkpoint.raw`; computed, in fp32, if the adapter has a delta for it."""
        if not self.touches(name):
            return self.base.raw(name)
        stored = self.tied.get(name, name)
        if stored in self._whole and len(self._parts[stored]) == 1:
            key = self._whole[stored]
            return self._file.places[key].dtype, self._file.bits(key)
        return "F32", self.read(name).contiguous().reshape(-1).numpy().view(np.uint32)

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return self.tied.get(name, name) in self._parts

    def computes(self, name: str) -> bool:
        """Whether a tensor is computed, by the adapter or by its base, and so takes memory while it is used."""
        stored = self.tied.get(name, name)
        if stored in self._parts:
            return stored not in self._whole or len(self._parts[stored]) > 1
        return super().computes(name)

    def _saved(self, key: str) -> torch.Tensor:
        place = self._file.places[key]
        return as_tensor(place.dtype, self._file.bits(key).copy()).reshape(place.shape)
