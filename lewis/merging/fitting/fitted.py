"""The tensors that a merge has fitted so far, on disk, and the merged model, readable before it is written.

A process that continues the fit of a killed one finds its fitted tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import copy
from pathlib import Path

import numpy as np

from lewis import store
from lewis.devices import one_thread
from lewis.errors import LewisError
from lewis.importance.gram_files import FinishedFiles
from lewis.lazy_torch import torch
from lewis.merging.engine.in_torch import merge_into
from lewis.merging.prepared import Prepared
from lewis.models.dtypes import bits_of, torch_dtype
from lewis.models.files.safetensors_file import TensorFile, write_file
from lewis.models.model import Model

Change = Callable[[str, "torch.Tensor"], "torch.Tensor"]
"""Changes a fitted tensor, given its name and its value in fp32, which may be overwritten."""


class Fitted:
    """The fitted tensors, on disk, a file for each block."""

    def __init__(self, folder: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]] | None = None) -> None:
        """
        Args:
            folder: of the files.
            layout: tensor of the output -> its dtype and shape; one that is not in it is read as it was written.
        """
        self.folder, self._files, self._layout = store.make_folder(folder), FinishedFiles(folder), layout or {}
        found = [folder / name for name in self._files.checksums]
        self._places = {tensor: path for path in found for tensor in TensorFile(path).places}
        self._changes: tuple[Change, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """Read a fitted tensor, in the dtype of the output."""
        from safetensors import safe_open

        with safe_open(self._places[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        found = found.clone()  # in the file its address may be unaligned, which changes the last bits of products
        if self._changes:
            with one_thread():
                found = found.float()
                for change in self._changes:
                    found = change(name, found)
        return rounded(self._layout, name, found)

    def with_updates(self, updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Fitted:
        """The same tensors, each with the product of two fp32 matrices added to it when it is read.

        Args:
            updates: tensor -> the matrices; the others stay as they are.
        """

        def updated(name: str, value: torch.Tensor) -> torch.Tensor:
            return torch.addmm(value, *updates[name]) if name in updates else value

        return self._changed(updated)

    def longer(self, base: Model, names: Collection[str], length: float) -> Fitted:
        """The same tensors W, in which W_0 + length (W - W_0) is read in place of each that is named.

        Args:
            base: has the tensors W_0.
            names: of the tensors; the others stay as they are.
            length: how long a move is, with that of the fit as 1.
        """

        def lengthened(name: str, value: torch.Tensor) -> torch.Tensor:
            if name not in names:
                return value
            start = base.read(name).float()
            base.done_with(name)
            return value.sub_(start).mul_(length).add_(start)

        return self._changed(lengthened)

    def _changed(self, change: Change) -> Fitted:
        made = copy(self)
        made._changes = (*self._changes, change)
        return made

    def add(self, block: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the fitted tensors of a block to a file."""
        path = self.folder / f"{block}.safetensors"
        self._files.add({path.name: write_file(path, {name: [tensor] for name, tensor in tensors.items()}, {})})
        self._places |= dict.fromkeys(tensors, path)


def rounded(layout: Mapping[str, tuple[str, tuple[int, ...]]], name: str, value: torch.Tensor) -> torch.Tensor:
    """Round a fitted tensor to the dtype that it has in `layout`, if it is there; the result is contiguous.

    Raises:
        LewisError: naming the tensor, if a value is not finite.
    """
    found = value.to(torch_dtype(layout[name][0]) if name in layout else value.dtype).contiguous()
    if not bool(torch.isfinite(found).all()):
        raise LewisError(f"{name}: the regression gave values that are NaN or Inf; raise parameters.ridge")
    return found


class Unwritten:
    """The merged model, whose tensors are merged as they are read; reads like a checkpoint."""

    def __init__(
        self,
        merge: Prepared,
        fitted: Fitted | None = None,
        place: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            merge: the merge whose result this is.
            fitted: the fitted tensors; None: every tensor is read as if nothing had been fitted.
            place: makes the empty tensors that results are written to, as `torch.empty`; by default in memory.
        """
        base = merge.base
        self.folder, self.home, self.key, self.config = base.folder, base.home, base.key, base.config
        self.tensors, self.tied, self.shapes = base.tensors, base.tied, base.shapes
        self.will_need, self.computes = base.will_need, base.computes
        self._merge, self._fitted, self._place = merge, fitted, place

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as the merge would write it: fitted, or merged now."""
        if self._fitted is not None and name in self._fitted:
            return self._fitted.read(name)
        anchor = self._merge.maker_of(name)
        dtype, shape = anchor.layout[name]
        found = merge_into(anchor, name, (self._place or torch.empty)(shape, dtype=torch_dtype(dtype)))
        self.done_with(name)
        return found

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Return the dtype and bits of a tensor as the merge would write it."""
        return bits_of(self.read(name))

    def done_with(self, name: str) -> None:
        """Release the memory that the models' tensors of this name are mapped to."""
        for model in self._merge.models_with(name):
            model.done_with(name)
