"""The merged model before it is written."""

from __future__ import annotations

from collections.abc import Callable

from lewis.lazy_torch import torch
from lewis.merging.fitted import Fitted
from lewis.merging.in_torch import merge_into
from lewis.merging.prepared import Prepared
from lewis.models.dtypes import torch_dtype


class Unwritten:
    """The merged model, whose tensors are merged as they are read; reads like a checkpoint."""

    def __init__(
        self,
        merge: Prepared,
        fitted: Fitted | None = None,
        place: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            merge: whose result it is.
            fitted: the fitted tensors; without them all tensors are as if nothing was fitted.
            place: makes the empty tensors that others are merged into; by default in memory.
        """
        base = merge.base
        self.folder, self.home, self.key, self.config = base.folder, base.home, base.key, base.config
        self.tensors, self.tied, self.shapes, self.raw = base.tensors, base.tied, base.shapes, base.raw
        self.will_need, self.done_with, self.computes = base.will_need, base.done_with, base.computes
        self._merge, self._fitted, self._place = merge, fitted, place

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it would be written."""
        if self._fitted is not None and name in self._fitted:
            return self._fitted.read(name)
        anchor = self._merge.anchor
        dtype, shape = anchor.layout[name]
        place = self._place or (lambda shape, dtype: torch.empty(shape, dtype=dtype))
        return merge_into(anchor, name, place(shape, torch_dtype(dtype)))
