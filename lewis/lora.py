"""PEFT LoRA adapters as experts: the delta of each tensor is computed when it is read, nothing is written to disk."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lewis.checkpoint import Checkpoint
from lewis.errors import InputError

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
    the base's.

    Attributes:
        folder: the adapter's folder.
        key: identity of base and adapter.
        base, config, tensors, tied: as of the base.
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
        try:
            self._handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: truncated, or no safetensors file ({error}); download it again") from error
        self._parts: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for key_in_file in self._handle.keys():  # noqa: SIM118  # no dict
            self._place(key_in_file)
        self._check_shapes()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor: the base's or the adapter's own if it is whole, otherwise base plus delta in fp32."""
        stored = self.tied.get(name, name)
        if stored in self._whole and stored not in self._parts:
            return self._handle.get_tensor(self._whole[stored])
        base = self.base.read(name)
        return base.to(torch.float32) + self._delta(name) if self.touches(name) else base

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return self.tied.get(name, name) in self._parts or self.tied.get(name, name) in self._whole

    def _place(self, key: str) -> None:
        """Find the tensor of the base that a key of the adapter file changes."""
        match = _KEY.match(key)
        # Beside a LoRA on an embedding, PEFT saves the embedding itself as its base_layer.
        whole = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name = (match["module"] + ".weight") if match else whole
        if name in self.tied:
            raise InputError(
                f"{self.folder / WEIGHTS}: {key!r} changes the head, which the base ties to its embedding; "
                "merge the adapter into its base with PEFT's merge_and_unload first"
            )
        if name not in self.tensors or (
            match is None and ("lora_" in key or not (self._settings.get("modules_to_save") or ".base_layer." in key))
        ):
            raise InputError(
                f"{self.folder / WEIGHTS}: the key {key!r} matches nothing in the base {self.base.folder}; "
                "expected an adapter of this base model"
            )
        if match:
            self._parts.setdefault(name, {})[match["part"].removeprefix("embedding_")] = key
        else:
            self._whole[name] = key

    def _check_shapes(self) -> None:
        for name, parts in self._parts.items():
            if parts.keys() != {"A", "B"}:
                raise InputError(
                    f"{self.folder / WEIGHTS}: {name!r} has lora_{''.join(parts)} only; expected lora_A and lora_B"
                )
            a, b = (self._handle.get_slice(parts[part]).get_shape() for part in "AB")
            fits = len(a) == len(b) == 2 and b[1] == a[0]
            given = ((a[1], b[0]) if self._transposed(parts) else (b[0], a[1])) if fits else None
            expected = self.tensors[name].shape
            if given != expected:
                raise InputError(
                    f"{self.folder / WEIGHTS}: lora_A {a} and lora_B {b} of {name!r} do not give the base's shape "
                    f"{list(expected)}; expected an adapter of this base model"
                )
        for name, key in self._whole.items():
            shape = tuple(self._handle.get_slice(key).get_shape())
            expected = self.tensors[name].shape
            if shape != expected:
                raise InputError(
                    f"{self.folder / WEIGHTS}: {key!r} has shape {list(shape)}, in the base it is {list(expected)}"
                )

    def _delta(self, name: str) -> torch.Tensor:
        name = self.tied.get(name, name)
        deltas = [self._low_rank(name)] if name in self._parts else []
        if name in self._whole:
            whole = self._handle.get_tensor(self._whole[name]).to(torch.float32)
            deltas.append(whole - self.base.read(name).to(torch.float32))
        return deltas[0] if len(deltas) == 1 else deltas[0] + deltas[1]

    def _low_rank(self, name: str) -> torch.Tensor:
        parts = self._parts[name]
        a, b = (self._handle.get_tensor(parts[part]).to(torch.float32) for part in "AB")
        module, rank = name.removesuffix(".weight"), a.shape[0]
        alpha = _pattern(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)
        delta = (b @ a) * scale
        return delta.T.contiguous() if self._transposed(parts) else delta

    def _transposed(self, parts: dict[str, str]) -> bool:
        """Whether the weight is stored as (in, out): an embedding, or GPT-2's Conv1D."""
        return "lora_embedding_A" in parts["A"] or bool(self._settings.get("fan_in_fan_out"))


Model = Checkpoint | LoraExpert


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
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
    return settings


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that equals the module's name or matches its end as a regular expression."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)
