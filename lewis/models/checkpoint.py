"""A Hugging Face model folder, read tensor by tensor. Safetensors only; quantised weights are computed when read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lewis.errors import InputError
from lewis.lazy_torch import torch
from lewis.models.config import read_config
from lewis.models.dtypes import as_tensor
from lewis.models.files.folder import is_of_gguf, weight_files
from lewis.models.files.safetensors_file import TensorFile, same_bits
from lewis.models.gguf import open_gguf
from lewis.models.model import TensorInfo
from lewis.models.names import EMBEDDINGS, HEADS, is_buffer, unwrapped
from lewis.models.quantised.find import find
from lewis.models.quantised.settings import without
from lewis.models.quantised.stored import Packed, Stored
from lewis.models.rehearsed import completed


class Checkpoint:
    """A model folder that is open for reading, with one safetensors file or several. Opening it reads no tensor.

    Attributes:
        folder: the folder.
        key: identity of the content (a commit, a digest); random streams depend on it.
        config: the parsed config.json, without its quantisation.
        tensors: name -> TensorInfo, without tied names and without the buffers that old checkpoints store. Quantised
            weights have the dtype that they had before, and are read in fp32.
        tied: name -> the stored tensor that it is tied to.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Open a folder.

        Raises:
            InputError: naming the file or tensor, if something is missing, truncated, pickled, in another folder, or
                quantised in a way that is not read.
        """
        self.folder, self.key = folder, key
        self.config = read_config(folder)
        self._stored: dict[str, TensorFile] = {}  # stored tensor -> its file
        self._packed: dict[str, Packed] = {}
        for file_name, wanted in weight_files(folder).items():
            file = TensorFile(folder / file_name, unwrapped)
            if missing := sorted((wanted or set()) - file.places.keys()):
                raise InputError(f"{file.path}: the index places {missing[0]!r} here, but the file has no such tensor")
            chosen = {name: place for name, place in file.places.items() if wanted is None or name in wanted}
            self._stored |= {name: file for name, place in chosen.items() if not is_buffer(name, place.shape)}
        if adapted := next((name for name in self._stored if ".lora_A." in name or ".base_layer." in name), None):
            raise InputError(
                f"{folder}: {adapted!r} is of a PEFT model that was saved with its adapter next to its weights; call "
                "merge_and_unload before save_pretrained, or give the adapter's own folder"
            )
        tensors = self._dequantised()
        if not tensors:
            raise InputError(f"{folder}: its weight files hold no tensor; download it again")
        self.tied = tied_head(folder, self.config, tensors)
        embeddings = [name for name in tensors if name.endswith(EMBEDDINGS)]
        for head in self.tied.keys() & tensors.keys():
            if not any(self._same(head, embedding) for embedding in embeddings):
                if _says_tied(self.config) == [None, None]:
                    self.tied = {}  # the class's default is not the model's (Mistral Small 3.1): transformers unties it
                    break
                raise InputError(
                    f"{folder}: {head!r} is tied to {self.tied[head]!r}, but both are stored and differ; set "
                    "tie_word_embeddings in config.json to false if the head is a weight of its own, else remove it"
                )
        self.tensors = {name: info for name, info in tensors.items() if name not in self.tied}

    def _dequantised(self) -> dict[str, TensorInfo]:
        """Return the model's tensors: the stored ones, with each quantised weight in place of its parts."""
        if is_of_gguf(self.folder):
            self._packed, dtype = open_gguf(self.folder, self.config)
            return {name: TensorInfo(dtype, packed.shape) for name, packed in self._packed.items()}
        places = {name: file.places[name] for name, file in self._stored.items()}
        stored = {name: (place.dtype, place.shape) for name, place in places.items()}
        self._packed, headers = find(self.folder, self.config, stored, self._part)
        if self._packed:
            self.config = without(self.config)
        return {name: TensorInfo(*header) for name, header in headers.items()}

    def _part(self, name: str) -> Stored:
        file = self._stored[name]
        return Stored(file.places[name].dtype, file.places[name].shape, file.bits(name))

    def _parts(self, name: str) -> list[str]:
        """The stored tensors that a tensor is made of: itself, if it is not quantised."""
        return list(self._packed[name].parts.values()) if name in self._packed else [name]

    def _same(self, *names: str) -> bool:
        (kind, bits), (other_kind, other_bits) = (self._bits(name) for name in names)
        return kind == other_kind and same_bits(bits, other_bits)

    @property
    def home(self) -> Path:
        """The folder with the model's config.json."""
        return self.folder

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of one tensor, in its stored dtype, or in fp32 if it is quantised."""
        dtype, bits = self.raw(name)
        shape = self.tensors[self.tied.get(name, name)].shape
        return as_tensor(dtype, bits if self.computes(name) else bits.copy()).reshape(shape)

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Return one tensor's dtype, as safetensors names it, and its bits: a flat view of the file.

        A quantised tensor is computed, in fp32, at each call.
        """
        return self._bits(self.tied.get(name, name))

    def _bits(self, name: str) -> tuple[str, np.ndarray]:
        packed = self._packed.get(name)
        if packed is None:
            stored = self._part(name)
            return stored.dtype, stored.bits
        try:
            with np.errstate(all="ignore"):  # a scale that is not finite is reported later, by the tensor's name
                values = packed.values(self._part)
            if values.shape != packed.shape:  # compiled loops would read on behind the values
                raise ValueError(f"they give the shape {list(values.shape)}, expected {list(packed.shape)}")
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.folder}: the parts of the quantised tensor {name!r} do not fit together ({error!r}); "
                "download the model again"
            ) from error
        return "F32", values.reshape(-1).view(np.uint32)

    def computes(self, name: str) -> bool:
        """Whether a tensor is computed, since it is quantised, and so takes memory while it is used."""
        return self.tied.get(name, name) in self._packed

    def will_need(self, name: str) -> None:
        """Ask the operating system to load a tensor from disk before it is read."""
        for part in self._parts(self.tied.get(name, name)):
            self._stored[part].will_need(part)

    def done_with(self, name: str) -> None:
        """Release the memory that a tensor is mapped to."""
        for part in self._parts(self.tied.get(name, name)):
            self._stored[part].done_with(part)


def tied_head(folder: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str]:
    """Return `{head: embedding}` if the config ties them, else empty. Tied tensors are merged once and stay tied.

    Args:
        folder: of the model.
        config: parsed.
        tensors: the names of the stored tensors.

    Raises:
        Refused: if the config does not say, and transformers refuses it.
    """
    tensors = list(tensors)
    embedding = next((name for name in tensors if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in tensors if name.endswith(HEADS)), None)
    if embedding is None:
        return {}
    said = _says_tied(config)
    if said == [None, None]:
        said = _says_tied(completed(folder, config) or {})
    if head is None:  # if none of them ties it, the model has no head, or its head is lost
        return {} if False in said and True not in said else {"lm_head.weight": embedding}
    return {head: embedding} if (said[1] if said[0] is None else said[0]) else {}


def _says_tied(config: Mapping[str, Any]) -> list[Any]:
    """Return `tie_word_embeddings` of a config and of that of its language model; None where it is not set."""
    return [block.get("tie_word_embeddings") for block in (config, config.get("text_config") or {})]
