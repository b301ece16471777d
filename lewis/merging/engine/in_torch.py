"""Merge tensors with the methods' own functions in torch: on a GPU all, on the CPU those without compiled loops.

If the method allows it, a large tensor is read and merged in runs of rows, so that it is never whole in memory. Such a
tensor is treated as a matrix whose columns are the last dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from lewis.devices import one_thread
from lewis.errors import LewisError
from lewis.lazy_torch import torch
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.rows import Finish, Piece, Pieces, rows_of
from lewis.models.broken import damaged
from lewis.models.dtypes import as_tensor, torch_dtype
from lewis.models.model import Model

PIECE = 1 << 18  # elements of a run of rows on the CPU
_PIECE_ON_GPU = 1 << 24
_PART = 1 << 15  # elements of a temporary tensor on the CPU: it stays in the cache


def merge_by_rows(merge: Prepared, name: str) -> Iterator[torch.Tensor]:
    """Merge one tensor in pieces, in order, if it is large and the method can merge by rows; else in one piece.

    Yields:
        Pieces, in the dtype of the layout, on the CPU.

    Raises:
        LewisError: naming the tensor and model of a value that is not finite.
    """
    tensor = _Tensor(merge, name)
    with one_thread(), merge.budget.take(tensor.at_a_time):
        finish = tensor.finish() if len(tensor.runs) > 1 else None
        if finish is not None:
            for rows in tensor.runs:
                yield tensor.merged(rows, finish)
            return
    with one_thread(), merge.budget.take(tensor.elements):
        yield tensor.merged(None, tensor.function)


def merge_into(merge: Prepared, name: str, out: torch.Tensor) -> torch.Tensor:
    """Merge one tensor as `merge_by_rows`, copy it into `out`, which has its shape and any dtype, and return `out`."""
    flat, start = out.reshape(-1), 0
    for piece in merge_by_rows(merge, name):
        flat[start : start + piece.numel()].copy_(piece.reshape(-1))
        start += piece.numel()
    return out


def is_whole(merge: Prepared, name: str) -> bool:
    """Whether a large tensor is whole in memory while torch merges it."""
    return _Tensor(merge, name).at_a_time == merge.base.tensors[name].elements > PIECE


def is_computed(merge: Prepared, name: str) -> bool:
    """Whether a model computes this tensor (a LoRA expert's, a quantised one): either engine then holds it whole."""
    return any(model.computes(name) for model in merge.models)


class _Tensor:
    """One tensor of a merge.

    Attributes:
        elements: number of elements.
        runs: the runs of rows that it is merged in; one run if it is small, or the method takes it whole.
        at_a_time: how many of its elements are in memory at a time, if it is merged in these runs.
    """

    def __init__(self, merge: Prepared, name: str) -> None:
        self._merge, self._name, self._method = merge, name, merge.method
        self._shape, self.elements = merge.base.tensors[name].shape, merge.base.tensors[name].elements
        self._copied = name in merge.excluded or not merge.base.tensors[name].floating or self.elements == 0
        self._raw, self._looked_at = dict[int, tuple[str, np.ndarray]](), set[tuple[int, int]]()
        rows, count = math.prod(self._shape[:-1]), 1
        if len(self._shape) > 1 and (self._copied or self._method.elementwise or self._method.by_rows):
            count = max(min(-(-self.elements // (PIECE if merge.device == "cpu" else _PIECE_ON_GPU)), rows), 1)
        bounds = [rows * i // count for i in range(count + 1)]
        self.runs = [slice(*pair) for pair in itertools.pairwise(bounds)]
        longest = max(run.stop - run.start for run in self.runs)
        self.at_a_time = self.elements if is_computed(merge, name) else longest * math.prod(self._shape[-1:])

    @cached_property
    def _values(self) -> dict[str, Any]:
        return self._merge.parameters(self._name)

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        return self._method.arguments(self._values)

    def function(self, piece: Piece) -> torch.Tensor:
        """Call the method's function on a piece, with all the arguments that it takes."""
        method, arguments = self._method, dict(self._arguments)
        if method.takes_base:
            arguments["base"] = piece.base
        if method.random:
            arguments["streams"] = [self._merge.stream(expert, self._name) for expert in self._merge.experts]
        if method.takes_scales:
            arguments["scales"] = piece.scales
        with method.blamed(self._name):
            return method(piece.tensors, **arguments)

    def finish(self) -> Finish | None:
        """Make the passes over the whole tensor that the method needs before it can merge by rows.

        Returns:
            The function that merges a run of rows; None if the method cannot merge by rows with these parameters.
        """
        if self._copied or self._method.elementwise:
            return self.function
        assert self._method.by_rows
        with torch.inference_mode(), self._method.blamed(self._name):
            pieces = Pieces(self._shape, lambda: map(self._piece, self.runs))
            return self._method.by_rows(pieces, **self._arguments)

    def merged(self, rows: slice | None, finish: Finish) -> torch.Tensor:
        """Merge these rows, or with None all of them in the tensor's own shape; rounded, on the CPU."""
        merge, dtype = self._merge, torch_dtype(self._merge.layout[self._name][0])
        if self._copied:
            return self._read(merge.base, rows).to(dtype)  # a base with an adapter on it is read in fp32
        with torch.inference_mode():
            merged = (self._on_task_vectors if merge.adds_to_base else self._on_weights)(rows, finish)
            return self._rounded(merged, dtype).cpu()

    def _on_weights(self, rows: slice | None, finish: Finish) -> torch.Tensor:
        piece = self._piece(rows)
        first, like = piece.tensors[0], self._values.get("normalize")
        same = (piece.tensors == first).all(dim=0) if like else None
        first = first.clone() if like and self._method.origin else first  # a plug-in may write into what it is given
        merged = self._finished(finish, piece, first)
        if same is not None:
            merged = torch.where(same, first, merged)  # the average of equal numbers is exact
        if self._method.takes_base:
            return merged
        for weight in piece.tensors:
            merged = torch.where(merged == weight, weight, merged)  # a sum loses the sign of -0.0
        return merged

    def _on_task_vectors(self, rows: slice | None, finish: Finish) -> torch.Tensor:
        merge, active = self._merge, self._merge.active(self._name, self._values)
        base = self._finite(merge.base, rows)
        if "density" in self._values and not any(active):
            return base
        given = base.clone() if self._method.takes_base and self._method.origin else base  # a plug-in may write into it
        delta = self._finished(finish, self._piece(rows, given), base)
        if self._name in merge.factors:
            delta = delta * self._of_rows(merge.factors[self._name], rows)
        # The models are read a second time instead of being kept in memory.
        merged = torch.empty(base.shape, device=base.device)
        for part, old, out in _in_parts(delta, base, merged):
            out.copy_(torch.where(part == 0, old, old + part))
        for expert, is_active in zip(merge.experts, active, strict=True):
            if is_active:
                for own, part, old, out in _in_parts(self._finite(expert.model, rows), delta, base, merged):
                    out.copy_(torch.where(part == own - old, own, out))
        return merged

    def _piece(self, rows: slice | None, base: torch.Tensor | None = None) -> Piece:
        merge = self._merge
        if base is None:
            base = self._finite(merge.base, rows)
        tensors = torch.empty((len(merge.experts), *base.shape), device=base.device)
        for expert, out in zip(merge.experts, tensors, strict=True):
            own = self._finite(expert.model, rows)
            if merge.adds_to_base:
                torch.sub(own, base, out=out)
            else:
                out.copy_(own)
        scales = [None if scale is None else self._of_rows(scale, rows) for scale in merge.scales(self._name)]
        return Piece(tensors, base, scales, rows.start * self._shape[-1] if rows else 0)

    def _of_rows(self, factor: torch.Tensor, rows: slice | None) -> torch.Tensor:
        return (factor if rows is None else rows_of(factor, self._shape, rows)).to(self._merge.device)

    def _read(self, model: Model, rows: slice | None) -> torch.Tensor:
        if rows is None:
            return model.read(self._name)
        if id(model) not in self._raw:  # read once: a LoRA expert's is computed
            self._raw[id(model)] = model.raw(self._name)
        dtype, bits = self._raw[id(model)]
        columns = self._shape[-1]
        return as_tensor(dtype, bits[rows.start * columns : rows.stop * columns].copy()).reshape(-1, columns)

    def _finite(self, model: Model, rows: slice | None) -> torch.Tensor:
        tensor = self._read(model, rows).to(self._merge.device).to(torch.float32)
        place = (id(model), rows.start if rows else -1)
        if place in self._looked_at:
            return tensor
        self._looked_at.add(place)
        if not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise damaged(model, f"tensor {self._name!r} has {bad} values that are NaN or Inf")
        return tensor

    def _finished(self, finish: Finish, piece: Piece, like: torch.Tensor) -> torch.Tensor:
        with self._method.blamed(self._name):
            merged = finish(piece)
        if not isinstance(merged, torch.Tensor):
            raise LewisError(f"{self._name}: {self._method.name} gave {type(merged).__name__}, expected a tensor")
        if merged.shape != like.shape:
            given, expected = list(merged.shape), list(like.shape)
            raise LewisError(f"{self._name}: {self._method.name} gave the shape {given}, expected {expected}")
        if merged.is_complex() or merged.layout is not torch.strided or merged.device != like.device:
            raise LewisError(
                f"{self._name}: {self._method.name} gave a tensor of {merged.dtype}, {merged.layout}, on "
                f"{merged.device}; expected a dense one of real numbers on {like.device}"
            )
        return merged

    def _rounded(self, merged: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = merged.to(dtype)
        if not _is_finite(rounded):
            if _is_finite(merged):
                raise LewisError(
                    f"{self._name}: the merged value {float(merged.abs().max()):.4g} does not fit {dtype}; "
                    "set out_dtype: bfloat16 or float32"
                )
            raise LewisError(f"{self._name}: {self._method.name} gave NaN or Inf; lower its weights or lambda")
        return rounded


def _in_parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split tensors of one shape into flat parts, so that temporary results are small."""
    size = _PART if tensors[0].device.type == "cpu" else _PIECE_ON_GPU
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(math.isfinite(end) for end in map(float, tensor.aminmax()))  # a NaN is both ends; one pass, no copies
