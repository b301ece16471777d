"""PEFT LoRA adapters as experts. Weights that they change are computed when read; nothing is written to disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from lewis.errors import InputError
from lewis.input_files import check_regular
from lewis.lazy_torch import torch
from lewis.models.dtypes import DTYPES, as_tensor
from lewis.models.files.folder import ADAPTER as WEIGHTS
from lewis.models.files.safetensors_file import TensorFile
from lewis.models.lora.config import read_settings
from lewis.models.lora.delta import LowRank, Replaced
from lewis.models.lora.modules import CONFIG
from lewis.models.lora.targets import Targets
from lewis.models.model import Model, View

logger = logging.getLogger(__name__)


def holds_adapter(files: Collection[str]) -> bool:
    """Whether a folder with these files is that of a PEFT adapter, not of a full model. It may have a config.json."""
    weights = [name for name in files if name.endswith((".safetensors", ".safetensors.index.json"))]
    return CONFIG in files and ("config.json" not in files or weights == [WEIGHTS])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a full model."""
    return folder.is_dir() and holds_adapter(os.listdir(folder))


class LoraExpert(View):
    """A model with a LoRA adapter on it; reads like a `Checkpoint`.

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
        summary: how many of the base's tensors the adapter has other names for, as a sentence; empty if none.
    """

    def __init__(self, base: Model, folder: Path, key: str) -> None:
        """Open an adapter.

        Raises:
            InputError: if it is another kind of adapter, or one of its keys matches nothing in the base, or has
                another shape.
        """
        self.base = self.model = base
        self.folder, self.key = folder, key
        self.config, self.tied = base.config, base.tied
        settings = read_settings(folder)
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
        targets = Targets(base, folder, settings, self._file)
        self._parts, self.summary = targets.parts, targets.summary
        if self.summary:
            logger.info("%s: %s", folder, self.summary)
        firsts = {name: parts[0] for name, parts in self._parts.items()}
        self._whole = {
            n: each.change.key for n, each in firsts.items() if each.whole and isinstance(each.change, Replaced)
        }
        self.tensors = {
            name: replace(info, shape=self._file.places[self._whole[name]].shape) if name in self._whole else info
            for name, info in base.tensors.items()
        }

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
