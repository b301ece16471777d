"""Find the tensors that a quantised model has once it is dequantised, by the headers of its files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from lewis.models.config import read_config
from lewis.models.files.folder import is_of_gguf
from lewis.models.files.safetensors_file import Headers, TensorFile
from lewis.models.network.network_class import known_network
from lewis.models.quantised.find import find, not_here
from lewis.models.quantised.settings import settings_of
from lewis.models.quantised.stored import Stored


def dequantised(where: object, folder: Path, headers: Headers, files: Mapping[str, Collection[str]] | None) -> Headers:
    """Return dtype and shape of each tensor of a model, by its name from before the quantisation.

    Args:
        where: the model, for error messages.
        folder: with its config.json.
        headers: of its stored tensors.
        files: name of each weight file -> its tensors; None if they are not in the folder yet.

    Raises:
        InputError: if it is quantised in a way that is not supported, or a part is missing.
    """
    if not (folder / "config.json").is_file():
        return dict(headers)
    opened: dict[str, TensorFile] = {}

    def read(name: str) -> Stored:
        file = next(file for file, names in (files or {}).items() if name in names)
        if file not in opened:
            opened[file] = TensorFile(folder / file)
        return Stored(*headers[name], opened[file].bits(name))

    weights, found = find(where, read_config(folder), headers, read if files else None)
    if unknown := {name for name, packed in weights.items() if packed.decode is not_here}:
        found |= {name: (found[name][0], shape) for name, shape in _of_class(folder, found, unknown).items()}
    return found


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a model folder are computed from others: its config says so, or it is a GGUF file's."""
    if is_of_gguf(folder):
        return True
    return (folder / "config.json").is_file() and settings_of(folder, read_config(folder)) is not None


def _of_class(folder: Path, found: Headers, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of some tensors in the model's class, if they have as many elements as the stored tensors."""
    network = known_network(folder)
    shapes = {} if network is None else {name: tuple(value.shape) for name, value in network.state_dict().items()}
    return {
        name: shapes[name] for name in names if name in shapes and math.prod(shapes[name]) == math.prod(found[name][1])
    }
