"""Checkpoints: read a Hugging Face folder tensor by tensor, write one shard by shard. Safetensors only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.models.pin import refuse_pickled
from lewis.models.safetensors_file import TensorFile, same_bits

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {  # safetensors' name of each dtype that a checkpoint may hold -> torch's name, bytes
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
PER_TOKEN = (*EMBEDDINGS, *HEADS, "lm_head.bias", "embed_out.bias")  # their first dimension is the vocabulary


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like; `dtype` as safetensors names it (`BF16`)."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def floating(self) -> bool:
        """Whether it takes part in a merge; integer and boolean buffers are copied from the base."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Checkpoint:
    """A Hugging Face model folder, one safetensors file or sharded, opened without reading its tensors.

    Attributes:
        folder: the folder.
        key: identity of the content (a commit, a digest); random streams are keyed by it.
        config: the parsed config.json.
        tensors: name -> TensorInfo, without the names that are tied to others, and old buffers.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Open a folder.

        Args:
            folder: holds config.json and the weights.
            key: identity of the content.

        Raises:
            InputError: naming the file or tensor, if something is missing, truncated, pickled, quantised, or outside.
        """
        self.folder, self.key = folder, key
        self.config = read_config(folder)
        self._files: dict[str, TensorFile] = {}
        tensors: dict[str, TensorInfo] = {}
        for file, wanted in weight_files(folder).items():
            self._files[file] = TensorFile(folder / file)
            places = self._files[file].places.items()
            found = {name: TensorInfo(place.dtype, place.shape, file) for name, place in places}
            missing = sorted(wanted - found.keys()) if wanted is not None else []
            if missing:
                raise InputError(
                    f"{folder / file}: the index places {missing[0]!r} here, but the file has no such tensor"
                )
            chosen = {name: info for name, info in found.items() if wanted is None or name in wanted}
            tensors |= {name: info for name, info in chosen.items() if not is_buffer(name, info.shape)}
        if not tensors:
            raise InputError(f"{folder}: its weight files hold no tensor; download it again")
        for name, info in tensors.items():
            quantised = name.endswith("weight") and info.dtype in ("I8", "U8", "I32") and len(info.shape) > 1
            if info.dtype not in DTYPES or quantised or name.endswith(".qweight"):
                raise InputError(
                    f"{folder}: tensor {name!r} is stored as {info.dtype}: a quantised checkpoint cannot be merged; "
                    "expected float32, float16 or bfloat16: use the unquantised model"
                )
        self.tied = _tied_head(self.config, tensors, folder)
        embeddings = [name for name in tensors if name.endswith(EMBEDDINGS)]
        for head in self.tied.keys() & tensors.keys():
            if not any(self._same(tensors, head, embedding) for embedding in embeddings):
                raise InputError(
                    f"{folder}: {head!r} is tied to {self.tied[head]!r}, but both are stored and differ; set "
                    "tie_word_embeddings in config.json to false if the head is a weight of its own, else remove it"
                )
        self.tensors = {name: info for name, info in tensors.items() if name not in self.tied}

    def _same(self, tensors: Mapping[str, TensorInfo], *names: str) -> bool:
        infos = [tensors[name] for name in names]
        bits = [self._files[i.file].bits(name, DTYPES[i.dtype][1]) for i, name in zip(infos, names, strict=True)]
        return len({(info.dtype, info.shape) for info in infos}) == 1 and same_bits(*bits)

    @property
    def home(self) -> Path:
        """Where its config.json is."""
        return self.folder

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in its stored dtype."""
        dtype, bits = self.raw(name)
        shape = self.tensors[self.tied.get(name, name)].shape
        return as_tensor(dtype, bits.copy()).reshape(shape)

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype, as safetensors names it, and its bits: flat, a view of the file."""
        name = self.tied.get(name, name)
        info = self.tensors[name]
        return info.dtype, self._files[info.file].bits(name, DTYPES[info.dtype][1])

    def will_need(self, name: str) -> None:
        """Let the system read a tensor ahead."""
        name = self.tied.get(name, name)
        self._files[self.tensors[name].file].will_need(name)

    def done_with(self, name: str) -> None:
        """Let go of the memory that a tensor is mapped to."""
        name = self.tied.get(name, name)
        self._files[self.tensors[name].file].done_with(name)


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it follows from the config, so that only old checkpoints (of Llama 2, Pythia, GPT-2) hold it."""
    mask = name.endswith((".attn.bias", ".attention.bias")) and len(shape) == 4 and shape[:2] == (1, 1)
    return mask or name.endswith("rotary_emb.inv_freq") or (name.endswith(".masked_bias") and math.prod(shape) == 1)


def as_tensor(dtype: str, bits: np.ndarray) -> torch.Tensor:
    """Bits of a dtype as safetensors names it, as `Checkpoint.raw` gives them; shares their memory."""
    return torch.from_numpy(bits).view(getattr(torch, DTYPES[dtype][0]))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        InputError: if it is missing or broken, or says that the weights are quantised.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no config.json; expected the folder of a Hugging Face model") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if not isinstance(config.get("text_config") or {}, dict):
        raise InputError(f"{path}: text_config: expected a JSON object, got {config['text_config']!r}")
    if found := config.get("quantization_config"):
        method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
        raise InputError(f"{folder}: a quantised checkpoint ({method}) cannot be merged; use the unquantised model")
    return config


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The weight files of a model folder, each with the tensors that the index places in it (None: all it has).

    Raises:
        InputError: if there are none, if they are pickled, or if the index names a file that is missing or elsewhere.
    """
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    index = folder / INDEX
    if not index.is_file():
        refuse_pickled(str(folder), [path.name for path in folder.glob("*")])
        raise InputError(f"{folder}: no weights; expected {SINGLE} or {INDEX}")
    try:
        weight_map = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: expected JSON with a weight_map from tensor to file: {error!r}") from error
    placed: dict[str, set[str]] = {file: set() for file in weight_map.values()}
    for file in placed:
        if Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{index}: {file!r} is not a plain file name; an index must not lead out of its folder")
        if not (folder / file).is_file():
            raise InputError(f"{folder}: the shard {file} is missing, which {INDEX} names; download it again")
    for name, file in weight_map.items():
        placed[file].add(name)
    return {**placed}


def _tied_head(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Path) -> dict[str, str]:
    """`{head: embedding}` where the config ties them, so that the one storage is merged once and stays tied."""
    embedding = next((name for name in tensors if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in tensors if name.endswith(HEADS)), None)
    if embedding is None:
        return {}
    said = [block.get("tie_word_embeddings") for block in (config, config.get("text_config") or {})]
    if head is None:  # a model without a head, where the config says that nothing is tied
        return {} if False in said and True not in said else {"lm_head.weight": embedding}
    tied = said[0] if "tie_word_embeddings" in config else said[1]
    if tied is None:
        tied = _class_default(folder)
    return {head: embedding} if tied else {}


def _class_default(folder: Path) -> bool:
    """What the model's class says about tying where config.json says nothing."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # any kind, by architecture
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder / 'config.json'}: no tie_word_embeddings, and transformers has no default: {reason}"
        ) from error
    return bool(getattr(config, "tie_word_embeddings", False))
