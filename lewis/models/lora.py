"""PEFT LoRA adapters as experts: the delta of each tensor is computed when it is read, nothing is written to disk."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lewis.devices import one_thread
from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.models.checkpoint import DTYPES, PER_TOKEN, Checkpoint, TensorInfo, as_tensor
from lewis.models.safetensors_file import TensorFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<part>embedding_[AB]|[AB])(?:\.\w+)?(?:\.weight)?$"
)
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a LoRA with biases (lora_bias)",
    "layer_replication": "a LoRA that replicates layers",
    "target_parameters": "a LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "a LoRA with trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which is not always on,",
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


class LoraExpert:
    """The base with a LoRA adapter on it; reads like a `Checkpoint`.

    The delta of a module is `scale * B @ A` in fp32, with `scale = alpha / r`, or `alpha / sqrt(r)` for rsLoRA
    (arXiv 2312.03732); `alpha_pattern` and `rank_pattern` are honoured. Modules saved whole (`modules_to_save`) replace
    the base's, and so do embeddings that were resized for new tokens.

    Attributes:
        folder: the adapter's folder.
        key: identity of base and adapter.
        base, config, tied: as of the base.
        tensors: as of the base, in the shapes that the adapter gives embeddings.
    """

    def __init__(self, base: Checkpoint, folder: Path, key: str) -> None:
        """Open an adapter.

        Raises:
            InputError: naming the key: another kind of adapter, a key that matches nothing in the base, other shapes.
        """
        self.base, self.folder, self.key = base, folder, key
        self.config, self.tensors, self.tied = base.config, base.tensors, base.tied
        self._settings = _read_settings(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            raise InputError(f"{folder}: no {WEIGHTS}; expected the folder of a PEFT adapter saved with safetensors")
        self._file = TensorFile(path)
        self._parts: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for key_in_file in self._file.places:
            self._place(key_in_file)
        self._check_shapes()
        self.tensors = {
            name: replace(info, shape=self._file.places[self._whole[name]].shape) if name in self._whole else info
            for name, info in base.tensors.items()
        }

    @property
    def home(self) -> Path:
        """Where its config.json is."""
        return self.base.folder

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        return self.base.shapes

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor: the base's or the adapter's own if it is whole, otherwise base plus delta in fp32."""
        stored = self.tied.get(name, name)
        if stored in self._whole and stored not in self._parts:
            return self._part(self._whole[stored])
        if not self.touches(name):
            return self.base.read(name)
        whole = self._part(self._whole[stored]) if stored in self._whole else self.base.read(name)
        return self._low_rank(stored).add_(whole)  # in fp32, and with no copy of it

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype and bits, as `Checkpoint.raw`; computed where the adapter changes the base."""
        if not self.touches(name):
            return self.base.raw(name)
        stored = self.tied.get(name, name)
        if stored in self._whole and stored not in self._parts:
            dtype = self._file.places[self._whole[stored]].dtype
            return dtype, self._file.bits(self._whole[stored], DTYPES[dtype][1])
        return "F32", self.read(name).contiguous().reshape(-1).numpy().view(np.uint32)

    def will_need(self, name: str) -> None:
        """As of the base; an adapter is small."""
        self.base.will_need(name)

    def done_with(self, name: str) -> None:
        """As of the base; an adapter is small."""
        self.base.done_with(name)

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return self.tied.get(name, name) in self._parts or self.tied.get(name, name) in self._whole

    def computes(self, name: str) -> bool:
        """Whether this tensor is computed, and so whole in memory while it is used."""
        return self.tied.get(name, name) in self._parts

    def _place(self, key: str) -> None:
        """Find the tensor of the base that a key of the adapter file changes."""
        match = _KEY.match(key)
        # Beside a LoRA on an embedding, PEFT saves the embedding itself as its base_layer.
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
        if match:
            self._parts.setdefault(name, {})[match["part"].removeprefix("embedding_")] = key
        else:
            self._whole[name] = key

    def _is_copy(self, key: str, name: str) -> bool:
        """Whether it is the head beside the embedding that it is tied to: PEFT saves both."""
        embedding = self.tied.get(name)
        other = next((k for k in self._file.places if embedding and k.endswith(f".{embedding}")), None)
        return (
            other is not None
            and self._file.places[key].shape == self._file.places[other].shape
            and bool(np.array_equal(self._file.bits(key, 1), self._file.bits(other, 1)))
        )

    def _check_shapes(self) -> None:
        for name, parts in self._parts.items():
            if parts.keys() != {"A", "B"}:
                raise InputError(
                    f"{self.folder / WEIGHTS}: {name!r} has lora_{''.join(parts)} only; expected lora_A and lora_B"
                )
            a, b = (self._file.places[parts[part]].shape for part in "AB")
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

    def _part(self, key: str) -> torch.Tensor:
        place = self._file.places[key]
        return as_tensor(place.dtype, self._file.bits(key, DTYPES[place.dtype][1]).copy()).reshape(place.shape)

    def _low_rank(self, name: str) -> torch.Tensor:
        parts = self._parts[name]
        a, b = (self._part(parts[part]).to(torch.float32) for part in "AB")
        module, rank = name.removesuffix(".weight"), a.shape[0]
        alpha = _pattern(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)
        with one_thread():  # over several, small products are summed in another order
            delta = (b @ a).mul_(scale)
        return delta.T.contiguous() if self._transposed(parts) else delta

    def _transposed(self, parts: dict[str, str]) -> bool:
        """Whether the weight is stored as (in, out): an embedding, or GPT-2's Conv1D."""
        return "lora_embedding_A" in parts["A"] or bool(self._settings.get("fan_in_fan_out"))


class Model(Protocol):
    """What is merged: a `Checkpoint`, or what reads like one."""

    folder: Path
    key: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    tied: dict[str, str]

    @property
    def home(self) -> Path:
        """Where its config.json is."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype, as safetensors names it, and its bits."""

    def will_need(self, name: str) -> None:
        """Let the system read a tensor ahead."""

    def done_with(self, name: str) -> None:
        """Let go of the memory that a tensor is mapped to."""


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{path}: expected a LoRA adapter (peft_type LORA), got {kind!r}; merge it into its base first"
        )
    refused = [words for key, words in _REFUSED.items() if settings.get(key)]
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        refused.append(f"a LoRA that changes its base (init_lora_weights {initial})")
    if settings.get("bias", "none") != "none":
        refused.append(f"a LoRA with trained biases (bias {settings['bias']})")
    if refused:
        raise InputError(
            f"{path}: {refused[0]} is not supported; merge it into its base with PEFT's merge_and_unload first"
        )
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: alpha_pattern: expected a JSON object, got {patterns!r}")
    for key, value in {"lora_alpha": settings.get("lora_alpha", 8), **patterns}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: {key}: expected a number, got {value!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{path}: alpha_pattern: {pattern!r} is no regular expression: {error}") from error
    return settings


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that equals the module's name or matches its end as a regular expression."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)
