"""The interface of a model whose tensors are read one by one: a checkpoint, or a view of another model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lewis.lazy_torch import torch
from lewis.models.dtypes import DTYPES, as_tensor, torch_dtype

_AT_A_TIME = 1 << 22  # elements that are converted to another dtype at a time


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, known before the tensor is read.

    Attributes:
        dtype: as safetensors names it (`BF16`).
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        """Whether the tensor is merged: of a floating dtype. Integer and boolean tensors are copied from the base."""
        return self.dtype in DTYPES and DTYPES[self.dtype].floating

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)


class Model(Protocol):
    """A model whose tensors can be read: a full model, or a base with an adapter on it.

    Attributes:
        folder: the folder with its weights; of a base with an adapter, the adapter's folder.
        key: identity of the content (a commit, a digest); random streams depend on it.
        config: the parsed config.json.
        tensors: name -> dtype and shape. A tied name is not among them.
        tied: name -> the stored tensor that it is tied to. `read` and `raw` accept both.
    """

    folder: Path
    key: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    tied: dict[str, str]

    @property
    def home(self) -> Path:
        """The folder with the model's config.json."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in its stored dtype or, if it is computed, in fp32."""

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Return one tensor's dtype and its bits: a flat array of `dtypes.bits_dtype`, often a view of the file."""

    def computes(self, name: str) -> bool:
        """Whether a tensor is computed when it is read, in fp32, and so takes memory while it is used."""

    def will_need(self, name: str) -> None:
        """Ask the operating system to load a tensor from disk before it is read."""

    def done_with(self, name: str) -> None:
        """Release the memory that a tensor is mapped to."""


def read_as(model: Model, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a given dtype. One that is stored in another dtype is converted in parts, to save memory."""
    info = model.tensors[model.tied.get(name, name)]
    if model.computes(name) or torch_dtype(info.dtype) == dtype:
        return model.read(name).to(dtype)
    kind, bits = model.raw(name)
    found = torch.empty(bits.size, dtype=dtype)
    for start in range(0, bits.size, _AT_A_TIME):
        found[start : start + _AT_A_TIME] = as_tensor(kind, bits[start : start + _AT_A_TIME].copy()).to(dtype)
    return found.reshape(info.shape)


class View:
    """Base class of models that read another model: under other names, with other rows, or with an adapter on it.

    Attributes:
        model: the other model.
        folder, tensors: as of a `Model`.
    """

    model: Model
    folder: Path
    tensors: dict[str, TensorInfo]

    @property
    def home(self) -> Path:
        """The folder with the model's config.json."""
        return self.model.home

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def _sources(self, name: str) -> Iterable[str]:
        """Return the tensors of the other model that a tensor is made of; by default the one of the same name."""
        return (name,)

    def computes(self, name: str) -> bool:
        """Whether a tensor is computed by the other model, and so takes memory while it is used."""
        return any(map(self.model.computes, self._sources(name)))

    def will_need(self, name: str) -> None:
        """Ask the operating system to load the sources of a tensor from disk before they are read."""
        for source in self._sources(name):
            self.model.will_need(source)

    def done_with(self, name: str) -> None:
        """Release the memory that the sources of a tensor are mapped to."""
        for source in self._sources(name):
            self.model.done_with(source)
