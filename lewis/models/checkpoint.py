"""A Hugging Face model folder, read tensor by tensor. Safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.models.config import read_config
from lewis.models.config_check import check_config
from lewis.models.dtypes import DTYPES, as_tensor
from lewis.models.files import weight_files
from lewis.models.model import TensorInfo
from lewis.models.names import EMBEDDINGS, HEADS, is_buffer
from lewis.models.safetensors_file import TensorFile, same_bits


class Checkpoint:
    """An open model folder, one safetensors file or several. Opening it reads no tensor.

    Attributes:
        folder: the folder.
        key: identity of the content (a commit, a digest); random streams depend on it.
        config: the parsed config.json.
        tensors: name -> TensorInfo, without tied names and without the buffers that old checkpoints store.
        tied: name -> the stored tensor that it is tied to.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Open a folder.

        Args:
            folder: holds config.json and the weights.
            key: identity of the content.

        Raises:
            InputError: naming the file or tensor, if something is missing, truncated, pickled, quantised, or in another
                folder.
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
        check_config(folder, self.config, {name: info.shape for name, info in tensors.items()})
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
        bits = [self._files[info.file].bits(name) for info, name in zip(infos, names, strict=True)]
        return len({(info.dtype, info.shape) for info in infos}) == 1 and same_bits(*bits)

    @property
    def home(self) -> Path:
        """The folder with its config.json."""
        return self.folder

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype; a copy."""
        dtype, bits = self.raw(name)
        shape = self.tensors[self.tied.get(name, name)].shape
        return as_tensor(dtype, bits.copy()).reshape(shape)

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """One tensor's dtype, as safetensors names it, and its bits: flat, a view of the file."""
        name = self.tied.get(name, name)
        info = self.tensors[name]
        return info.dtype, self._files[info.file].bits(name)

    def will_need(self, name: str) -> None:
        """Ask the system to read a tensor ahead."""
        name = self.tied.get(name, name)
        self._files[self.tensors[name].file].will_need(name)

    def done_with(self, name: str) -> None:
        """Release the memory that a tensor is mapped to."""
        name = self.tied.get(name, name)
        self._files[self.tensors[name].file].done_with(name)


def _tied_head(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Path) -> dict[str, str]:
    """`{head: embedding}` if the config ties them, else empty. What is tied is merged once and stays tied."""
    embedding = next((name for name in tensors if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in tensors if name.endswith(HEADS)), None)
    if embedding is None:
        return {}
    said = [block.get("tie_word_embeddings") for block in (config, config.get("text_config") or {})]
    if head is None:  # not stored: it is tied, unless the config says that nothing is (a model without a head)
        return {} if False in said and True not in said else {"lm_head.weight": embedding}
    tied = said[0] if "tie_word_embeddings" in config else said[1]
    if tied is None:
        tied = _class_default(folder)
    return {head: embedding} if tied else {}


def _class_default(folder: Path) -> bool:
    """Whether the model's class ties the head by default. Asked only if config.json does not say, since it is slow."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each architecture raises its own kind
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder / 'config.json'}: no tie_word_embeddings, and transformers has no default: {reason}"
        ) from error
    return bool(getattr(config, "tie_word_embeddings", False))
