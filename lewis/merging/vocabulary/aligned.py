"""A model whose embeddings are read in the order of another vocabulary.

A tensor whose rows change places is written, some rows at a time, to an unnamed temporary file in the store, which is
mapped into memory as the model's own files are. So the tensor is never whole in anonymous memory, and the file is gone
as soon as the tensor has been merged or the process has died.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lewis import store
from lewis.errors import LewisError
from lewis.lazy_torch import torch
from lewis.merging.vocabulary.tokens import Target
from lewis.models.dtypes import as_tensor, bits_dtype, bytes_of, torch_dtype
from lewis.models.model import Model, View

_RUN = 1 << 20  # elements that are written to the file at a time


class Aligned(View):
    """A model with the rows of its embeddings in the order of another vocabulary; reads like a `Checkpoint`.

    Attributes:
        folder, key, config, tied: those of the model.
        tensors: those of the model, with the new shapes.
        rows: the argument `rows`.
    """

    def __init__(
        self, model: Model, names: Collection[str], rows: np.ndarray, lenders: Lenders, target: Target
    ) -> None:
        """Wrap a model so that it is read in the order of `target`.

        Args:
            model: the model.
            names: names of the tensors that have a row per token: embeddings and heads.
            rows: int64, shape (target.rows,): the model's own row for each row of the target; -1 where it has none.
            lenders: the models that give the rows which this model does not have.
            target: the vocabulary of the result.
        """
        self.model, self.folder, self.key = model, model.folder, model.key
        self.config, self.tied = model.config, model.tied
        self._names, self.rows, self._lenders = frozenset(names), rows, lenders
        self._own_rows, self._copies = embedding_rows(model, names), dict[str, tuple[str, np.ndarray]]()
        self._mean_from = target.padded_from if target.padded_from < target.rows else None
        in_order = self._mean_from is None and rows[0] >= 0 and np.array_equal(rows, np.arange(len(rows)) + rows[0])
        self._first = int(rows[0]) if in_order else None
        self.tensors = {
            name: replace(info, shape=(target.rows, *info.shape[1:])) if name in self._names else info
            for name, info in model.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype of `raw`."""
        if not self._touches(name):
            return self.model.read(name)
        dtype, bits = self.raw(name)
        shape = self.tensors[self.tied.get(name, name)].shape
        return as_tensor(dtype, bits.copy()).reshape(shape)

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Return one tensor's dtype and bits, as `Checkpoint.raw`.

        The dtype is F32 if a row is a mean, or comes from another model that stores it in another dtype.
        """
        if not self._touches(name):
            return self.model.raw(name)
        if self._first is not None:
            dtype, bits = self.model.raw(name)
            width = bits.size // self._own_rows
            return dtype, bits[self._first * width : (self._first + len(self.rows)) * width]
        if name not in self._copies:
            self._copies[name] = self._copy(name)
        return self._copies[name]

    def done_with(self, name: str) -> None:
        """Release a tensor of the model, and the file that was written for it."""
        self._copies.pop(name, None)
        super().done_with(name)

    def _copy(self, name: str) -> tuple[str, np.ndarray]:
        lent, (dtype, bits) = LentRows(self._lenders, name, np.flatnonzero(self.rows < 0)), self.model.raw(name)
        out = dtype if lent.dtypes <= {dtype} and self._mean_from is None else "F32"
        try:
            with tempfile.TemporaryFile(dir=store.make_folder(store.home())) as file:
                for part in self._parts(dtype, bits.reshape(self._own_rows, -1), lent, out):
                    file.write(bytes_of(part))
                file.flush()
                return out, np.memmap(file, bits_dtype(out), mode="r")
        except OSError as error:
            raise LewisError(
                f"{store.home()}: cannot write the rows of {name!r} in their new order: {error.strerror}; free space"
            ) from error

    def _parts(self, dtype: str, own: np.ndarray, lent: LentRows, out: str) -> Iterator[torch.Tensor]:
        """Yield the rows in their new order, in runs; rows of padding are the others' mean if the target says so."""
        run, rows = max(_RUN // max(own.shape[1], 1), 1), self.rows[: self._mean_from]
        total = torch.zeros(own.shape[1], dtype=torch.float64)
        for start in range(0, len(rows), run):
            taken = rows[start : start + run]
            part = as_tensor(dtype, own[taken.clip(0)]).to(torch_dtype(out))
            missing = np.flatnonzero(taken < 0)
            part[torch.from_numpy(missing)] = lent.read(start + missing).to(part.dtype)
            if self._mean_from is not None:
                total += part.sum(dim=0, dtype=torch.float64)
            yield part
        padding = len(self.rows) - len(rows)
        for start in range(0, padding, run):
            yield (total / len(rows)).float().expand(min(run, padding - start), -1)

    def _touches(self, name: str) -> bool:
        # This model may tie a head that is separate in the base.
        return name in self._names or self.tied.get(name, name) in self._names


def embedding_rows(model: Model, names: Collection[str]) -> int:
    """The number of rows of a model's embeddings and heads; 0 if it has no such tensor, or their numbers differ."""
    stored = {model.tied.get(name, name) for name in names}
    found = {model.tensors[name].shape[:1] for name in stored if name in model.tensors}
    return found.pop()[0] if len(found) == 1 and () not in found else 0


Origin = tuple[tuple[int, int], ...]
"""The rows whose mean one row is, each as (index of the model, its row); empty: the row is 0."""


class Lenders(NamedTuple):
    """The models of a merge, and which of their rows replace a row that a model lacks; the same for all that lack it.

    Attributes:
        models: the models; an `Origin` names one by its index here.
        origins: row of the common vocabulary -> the rows that replace it.
    """

    models: Sequence[Model]
    origins: Mapping[int, Origin]


class LentRows:
    """Rows of one tensor that a model lacks, taken from the models that have them.

    Attributes:
        dtypes: dtypes of the lenders' tensors, as safetensors names them; F32 alone if a row is a mean.
    """

    def __init__(self, lenders: Lenders, name: str, rows: np.ndarray) -> None:
        """
        Args:
            lenders: the models that have the rows.
            name: name of the tensor.
            rows: numbers of the lacking rows in the common vocabulary, int64.
        """
        self._origins, wanted = lenders.origins, [lenders.origins[row] for row in rows.tolist()]
        numbers = sorted({number for origin in wanted for number, _ in origin})
        self._lenders = {number: _matrix(lenders.models[number], name) for number in numbers}
        means = any(len(origin) > 1 for origin in wanted)
        self.dtypes = {"F32"} if means else {dtype for dtype, _ in self._lenders.values()}

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Read some of these rows, by their numbers in the common vocabulary: fp32, shape (len(rows), columns)."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(rows.tolist()):
            for model, number in self._origins[row]:
                wanted.setdefault(model, []).append((place, number))
        width = next((matrix.shape[1] for _, matrix in self._lenders.values()), 1)
        result = torch.zeros(len(rows), width)
        for model, pairs in sorted(wanted.items()):
            places, numbers = (np.array(column) for column in zip(*pairs, strict=True))
            dtype, matrix = self._lenders[model]
            result[torch.from_numpy(places)] += as_tensor(dtype, matrix[numbers]).to(torch.float32)
        counts = [max(len(self._origins[row]), 1) for row in rows.tolist()]
        return result / torch.tensor(counts).reshape(-1, 1)


def _matrix(model: Model, name: str) -> tuple[str, np.ndarray]:
    """A tensor's dtype and bits, one row per token."""
    dtype, bits = model.raw(name)
    return dtype, bits.reshape(model.tensors[model.tied.get(name, name)].shape[0], -1)
