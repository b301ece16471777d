"""Checkpoints: read a Hugging Face folder tensor by tensor, write one shard by shard. Safetensors only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lewis.errors import InputError, LewisError
from lewis.pinned import refuse_pickled

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


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
        return int(torch.Size(self.shape).numel())


class Checkpoint:
    """A Hugging Face model folder, one safetensors file or sharded, opened without reading its tensors.

    Attributes:
        folder: the folder.
        key: identity of the content (a commit, a digest); random streams are keyed by it.
        config: the parsed config.json.
        tensors: name -> TensorInfo, without the names that are tied to others.
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
        self._handles: dict[str, Any] = {}
        tensors: dict[str, TensorInfo] = {}
        for file, wanted in weight_files(folder).items():
            found = self._headers(file)
            missing = sorted(wanted - found.keys()) if wanted is not None else []
            if missing:
                raise InputError(
                    f"{folder / file}: the index places {missing[0]!r} here, but the file has no such tensor"
                )
            tensors |= {name: info for name, info in found.items() if wanted is None or name in wanted}
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
        self.tensors = {name: info for name, info in tensors.items() if name not in self.tied}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in its stored dtype.

        Raises:
            LewisError: if its bytes cannot be read.
        """
        name = self.tied.get(name, name)
        info = self.tensors[name]
        try:
            return self._handle(info.file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise LewisError(f"{self.folder / info.file}: cannot read {name!r}: {error}") from error

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{self.folder / file}: truncated, or no safetensors file ({error}); download it again"
                ) from error
        return self._handles[file]

    def _headers(self, file: str) -> dict[str, TensorInfo]:
        handle = self._handle(file)
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  # no dict
        return {name: TensorInfo(s.get_dtype(), tuple(s.get_shape()), file) for name, s in slices.items()}


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
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
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
    if head is None:
        return {"lm_head.weight": embedding}
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
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
