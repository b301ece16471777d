"""The tensors that a merge has fitted so far, on disk: a process that goes on after a kill finds them again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lewis import store
from lewis.lazy_torch import torch
from lewis.models.files.safetensors_file import write_file


class Fitted:
    """The fitted tensors, on disk, a file for each block.

    A file that a killed process has finished is found again: its checksum stands in a list beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._index, self._places = folder / "blocks.json", dict[str, Path]()
        known = store.read_entry(self._index) or {}
        for name, (sha256, tensors) in known.items():
            path = folder / name
            if path.is_file() and store.file_sha256(path) == sha256:
                self._places |= dict.fromkeys(tensors, path)
        self._known = {path.name: known[path.name] for path in dict.fromkeys(self._places.values())}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """A fitted tensor, in the dtype of the output."""
        from safetensors import safe_open

        with safe_open(self._places[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found.clone()  # in a file a tensor begins anywhere, on which products depend in their last bits

    def add(self, block: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors of a block."""
        path = self.folder / f"{block}.safetensors"
        sha256 = write_file(path, {name: [tensor] for name, tensor in tensors.items()}, {})
        self._known[path.name] = [sha256, list(tensors)]
        store.write_entry(self._index, self._known)
        self._places |= dict.fromkeys(tensors, path)
