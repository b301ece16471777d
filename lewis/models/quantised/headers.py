"""The tensors that a model has once its quantised weights are read, from the headers of its files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from lewis.models.config import read_config
from lewis.models.quantised.find import check_plain, find
from lewis.models.quantised.settings import dtype_of, settings_of
from lewis.models.quantised.stored import Stored
from lewis.models.safetensors_file import Headers, TensorFile


def dequantised(
    where: object, folder: Path, headers: Headers, files: Mapping[str, Collection[str]] | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of the model, named as before it was quantised.

    Args:
        where: the model, for error messages.
        folder: with its config.json.
        headers: of its stored tensors.
        files: name of each weight file -> its tensors; None if they are not in the folder yet.

    Raises:
        InputError: if it is quantised in a way that is not read, or a part is missing.
    """
    if not (folder / "config.json").is_file():
        return dict(headers)
    config = read_config(folder)
    settings = settings_of(where, config)
    found: dict[str, tuple[str, tuple[int, ...]]] = dict(headers)
    if settings is not None:
        opened: dict[str, TensorFile] = {}

        def read(name: str) -> Stored:
            file = next(file for file, names in (files or {}).items() if name in names)
            if file not in opened:
                opened[file] = TensorFile(folder / file)
            return Stored(*headers[name], opened[file].bits(name))

        found = find(where, settings, headers, read if files else None).logical(headers, dtype_of(config))
    check_plain(where, found, settings)
    return found
