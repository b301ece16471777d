"""Rows of embeddings that a model takes from others, for the tokens that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lewis.lazy_torch import torch
from lewis.models.dtypes import as_tensor
from lewis.models.model import Model

Origin = tuple[tuple[int, int], ...]
"""(number of the model, its row) of each row that one row is the mean of; empty: the row is 0."""


class Lenders:
    """Models that lend rows to those that lack them, by one rule for all.

    Attributes:
        models: the models, by their numbers in the origins.
        origins: row of the common vocabulary -> where it comes from.
    """

    def __init__(self, models: Sequence[Model], origins: Mapping[int, Origin]) -> None:
        self.models, self.origins = models, origins

    def of(self, name: str, rows: np.ndarray) -> LentRows:
        """These rows of one tensor: int64, numbers in the common vocabulary."""
        models = {model for row in rows.tolist() for model, _ in self.origins[row]}
        return LentRows({i: _matrix(self.models[i], name) for i in sorted(models)}, self.origins, rows)


class LentRows:
    """Rows of one tensor that a model does not have itself.

    Attributes:
        dtypes: of the lenders' tensors, as safetensors names them; F32 if a row is a mean.
    """

    def __init__(
        self, lenders: Mapping[int, tuple[str, np.ndarray]], origins: Mapping[int, Origin], rows: np.ndarray
    ) -> None:
        self._lenders, self._origins = lenders, origins
        means = any(len(origins[row]) > 1 for row in rows.tolist())
        self.dtypes = {"F32"} if means else {dtype for dtype, _ in lenders.values()}

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Some of these rows: fp32, shape (len(rows), columns)."""
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
