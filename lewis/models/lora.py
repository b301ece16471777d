"""PEFT LoRA adapters as experts. The delta of a tensor is computed when it is read; nothing is written to disk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from lewis.devices import one_thread
from lewis.errors import InputError
from lewis.input_files import check_regular
from lewis.lazy_torch import torch
from lewis.models.checkpoint import Checkpoint
from lewis.models.dtypes import DTYPES, as_tensor
from lewis.models.lora_config import CONFIG, by_pattern, read_settings
from lewis.models.names import PER_TOKEN
from lewis.models.safetensors_file import TensorFile, same_bits

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<part>embedding_[AB]|[AB])(?:\.\w+)?(?:\.weight)?$"
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a full model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


class LoraExpert:
    """A base with a LoRA adapter on it; reads like a `Checkpoint`.

    The delta of a module is `scale * B @ A` in fp32, with `scale = alpha / r`, or `alpha / sqrt(r)` for rsLoRA
    (arXiv 2312.03732); `alpha_pattern` and `rank_pattern` are followed. Modules that the adapter saves whole
    (`modules_to_save`) replace the base's, and so do embeddings that were resized for new tokens.

    Attributes:
        base: the base.
        folder: the adapter's folder.
        key: identity of base and adapter.
        config, tied: the base's.
        tensors: the base's; embeddings that the adapter resized have its shapes.
    """

    def __init__(self, base: Checkpoint, folder: Path, key: str) -> None:
        """Open an adapter.

        Raises:
            InputError: if it is another kind of adapter, or one of its keys matches nothing in the base, or has
                another shape.
        """
        self.base, self.folder, self.key = base, folder, key
        self.config, self.tensors, self.tied = base.config, base.tensors, base.tied
        self._settings = read_settings(folder)
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
        self._parts: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for key_in_file in self._file.places:
            self._place(key_in_file)
        self._alphas: dict[str, float] = {}
        self._check_shapes()
        self.tensors = {
            name: replace(info, shape=self._file.places[self._whole[name]].shape) if name in self._whole else info
            for name, info in base.tensors.items()
        }

    @property
    def home(self) -> Path:
        """The folder with its config.json: the base's."""
        return self.base.folder

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        return self.base.shapes

    def read(self, name: str) -> torch.Tensor:
        """One tensor: the base's, or the one that the adapter saves whole; with a delta, their sum in fp32."""
        stored = self.tied.get(name, name)
        if stored in self._whole and stored not in self._parts:
            return self._part(self._whole[stored])
        if not self.touches(name):
            return self.base.read(name)
        whole = self._part(self._whole[stored]) if stored in self._whole else self.base.read(name)
        return self._low_rank(stored).add_(whole)  # fp32, added in place

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype and bits, as `Checkpoint.raw`; computed, in fp32, where the adapter has a delta."""
        if not self.touches(name):
            return self.base.raw(name)
        stored = self.tied.get(name, name)
        if stored in self._whole and stored not in self._parts:
            key = self._whole[stored]
            return self._file.places[key].dtype, self._file.bits(key)
        return "F32", self.read(name).contiguous().reshape(-1).numpy().view(np.uint32)

    def will_need(self, name: str) -> None:
        """As `Checkpoint`, for the base: an adapter is small."""
        self.base.will_need(name)

    def done_with(self, name: str) -> None:
        """As `Checkpoint`, for the base: an adapter is small."""
        self.base.done_with(name)

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return self.tied.get(name, name) in self._parts or self.tied.get(name, name) in self._whole

    def computes(self, name: str) -> bool:
        """Whether this tensor is computed, and so takes memory while it is used: by the adapter, or of its base."""
        return self.tied.get(name, name) in self._parts or (not self.touches(name) and self.base.computes(name))

    def _place(self, key: str) -> None:
        """Find the tensor of the base that a key of the adapter file changes."""
        match = _KEY.match(key)
        # With a LoRA on an embedding, PEFT saves the embedding itself too, as base_layer.
        whole = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name = (match["module"] + ".weight") if match else whole
        if match is None and self._is_copy(key, name):
            return
        if name in self.tied:
            raise InputError(
                f"{self.folder / WEIGHTS}: {key!r} changes the head, which the base ties to its embedding; "
                "merge the adapter into its base with PEFT's merge_and_unload first"
            )
        saved_whole = self._settings.get("modules_to_save") or ".base_layer." in key or name.endswith(PER_TOKEN)
        if name not in self.tensors or (match is None and ("lora_" in key or not saved_whole)):
            raise InputError(
                f"{self.folder / WEIGHTS}: the key {key!r} matches nothing in the base {self.base.folder}; "
                "expected an adapter of this base model"
            )
        found, place = (self._parts.setdefault(name, {}), match["part"][-1]) if match else (self._whole, name)
        if place in found:
            raise InputError(
                f"{self.folder / WEIGHTS}: {found[place]!r} and {key!r} stand for the same tensor; keep one adapter"
            )
        found[place] = key

    def _is_copy(self, key: str, name: str) -> bool:
        """Whether it is a tied head, equal to the embedding that is saved too: PEFT saves both."""
        embedding = self.tied.get(name)
        other = next((k for k in self._file.places if embedding and k.endswith(f".{embedding}")), None)
        if other is None:
            return False
        place, embedded = self._file.places[key], self._file.places[other]
        alike = (place.dtype, place.shape) == (embedded.dtype, embedded.shape)
        return alike and same_bits(self._file.bits(key), self._file.bits(other))

    def _check_shapes(self) -> None:
        for name, parts in self._parts.items():
            if parts.keys() != {"A", "B"}:
                raise InputError(
                    f"{self.folder / WEIGHTS}: {name!r} has lora_{''.join(parts)} only; expected lora_A and lora_B"
                )
            a, b = (self._file.places[parts[part]].shape for part in "AB")
            self._check_rank(name, a, b)
            alpha, patterns = self._settings.get("lora_alpha", 8), self._settings.get("alpha_pattern")
            self._alphas[name] = by_pattern(patterns, name.removesuffix(".weight"), alpha)
            fits = len(a) == len(b) == 2 and b[1] == a[0]
            given = ((a[1], b[0]) if self._transposed(parts) else (b[0], a[1])) if fits else None
            expected = self._file.places[self._whole[name]].shape if name in self._whole else self.tensors[name].shape
            if given != expected:
                raise InputError(
                    f"{self.folder / WEIGHTS}: lora_A {list(a)} and lora_B {list(b)} of {name!r} do not give the "
                    f"base's shape {list(expected)}; expected an adapter of this base model"
                )
        for name, key in self._whole.items():
            shape = self._file.places[key].shape
            expected, per_row = self.tensors[name].shape, int(name.endswith(PER_TOKEN))
            if shape[per_row:] != expected[per_row:] or len(shape) != len(expected):
                raise InputError(
                    f"{self.folder / WEIGHTS}: {key!r} has shape {list(shape)}, in the base it is {list(expected)}"
                )

    def _check_rank(self, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        if 0 in (*a, *b):
            raise InputError(
                f"{self.folder / WEIGHTS}: lora_A {list(a)} and lora_B {list(b)} of {name!r} are of rank 0 or empty; "
                "expected a rank of 1 or more"
            )
        stated = self._settings.get("r")
        if stated is None:
            return  # older files lack it
        stated = by_pattern(self._settings.get("rank_pattern"), name.removesuffix(".weight"), stated)
        if a[:1] != (stated,):
            raise InputError(
                f"{self.folder / CONFIG}: r is {stated:g} for {name!r}, but its lora_A is {list(a)}; "
                "the config belongs to another adapter"
            )

    def _part(self, key: str) -> torch.Tensor:
        place = self._file.places[key]
        return as_tensor(place.dtype, self._file.bits(key).copy()).reshape(place.shape)

    def _low_rank(self, name: str) -> torch.Tensor:
        parts = self._parts[name]
        a, b = (self._part(parts[part]).to(torch.float32) for part in "AB")
        rank, alpha = a.shape[0], self._alphas[name]
        scale = alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)
        with one_thread():  # several threads would change the order of sums even in small products
            delta = (b @ a).mul_(scale)
        return delta.T.contiguous() if self._transposed(parts) else delta

    def _transposed(self, parts: dict[str, str]) -> bool:
        """Whether the weight is stored as (in, out): an embedding, or GPT-2's Conv1D."""
        return "lora_embedding_A" in parts["A"] or bool(self._settings.get("fan_in_fan_out"))
