"""The tensors of a GGUF file, dequantised by the functions of the package `gguf` one by one, when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.models.files import GGUF_LINK, GGUF_TABLE
from lewis.models.quantised.stored import Packed


def open_gguf(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Packed], str]:
    """The tensors of a folder that `gguf_folder` made; none is read.

    Args:
        folder: with the table of the tensors, and a link to the file.
        config: the parsed config.json: how heads are laid out depends on it.

    Returns:
        Tensor -> how it is computed; and the dtype of all of them, as safetensors names it.

    Raises:
        InputError: if the file is gone, or cut short.
    """
    table = read_json(folder / GGUF_TABLE)
    try:
        blob = np.memmap(folder / GGUF_LINK, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / GGUF_LINK}: the GGUF file cannot be opened ({error}); was it moved?") from error
    file = _File(folder / GGUF_LINK, blob, table["stored"], table["architecture"], dict(config))
    found = {
        name: Packed({}, tuple(each["shape"]), partial(file.decode, name, each["from"], tuple(each["shape"])))
        for name, each in table["tensors"].items()
    }
    return found, table["dtype"]


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of such a folder."""
    table = read_json(folder / GGUF_TABLE)
    return {name: (table["dtype"], tuple(each["shape"])) for name, each in table["tensors"].items()}


class _File:
    def __init__(
        self, path: Path, blob: np.ndarray, stored: Mapping[str, Any], architecture: str, config: dict[str, Any]
    ) -> None:
        self._path, self._blob, self._stored = path, blob, stored
        self._architecture, self._config = architecture, config

    def decode(self, name: str, sources: Sequence[str], shape: tuple[int, ...], _: Any) -> np.ndarray:
        """A tensor of the model in fp32, by transformers' rules of which values llama.cpp stores otherwise."""
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        process = _processors().get(self._architecture, _plain())(config=self._config)
        # Names as transformers' processors look them up: with their ending, and without.
        mapping = {key: name for source in sources for key in (source, source.removesuffix(".weight"))}
        found = None
        for source in sources:
            made = process.process(
                weights=self._values(source), name=source, tensor_key_mapping=mapping, parsed_parameters=parsed
            )
            found = made.weights if made.name is not None else None
        if name in parsed["tensors"]:
            found = parsed["tensors"][name].numpy()
        if found is None or [n for n in found.shape if n != 1] != [n for n in shape if n != 1]:
            given = None if found is None else list(found.shape)
            raise ValueError(f"{sources} give the shape {given}, expected {list(shape)}")
        values = np.ascontiguousarray(found, np.float32).reshape(shape)  # some writers leave dimensions of 1 out
        return values if values.flags.writeable else values.copy()  # not a view of the file

    def _values(self, source: str) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        kind, start, shape = self._stored[source]
        dtype = {0: np.float32, 1: np.float16}.get(kind, np.uint8)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = self._blob[start : start + size]
        if data.size != size:
            raise ValueError("the file was cut short")
        values: np.ndarray = dequantize(data.view(dtype).reshape(shape), GGMLQuantizationType(kind))
        return values


@cache
def _processors() -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    return dict(TENSOR_PROCESSORS)


@cache
def _plain() -> Any:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

    return TensorProcessor
