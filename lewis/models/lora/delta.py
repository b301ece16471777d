"""The kinds of changes that a LoRA adapter makes to a weight; most can be applied to a part of its flat values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from lewis.devices import one_thread
from lewis.lazy_torch import torch
from lewis.models.dtypes import as_tensor

Raw = Callable[[str], tuple[str, np.ndarray]]
"""Key in the adapter's file -> dtype as safetensors names it, and bits in the tensor's shape: a view of the file."""


class Change(Protocol):
    """A change that an adapter makes to one weight.

    Attributes:
        shape: of the weight, as it is stored.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def apply(self, values: torch.Tensor, start: int) -> None:
        """Change a run of the weight's values in place.

        Args:
            values: fp32, flat.
            start: index of the first one among the weight's flat values.
        """


@dataclass(frozen=True)
class Replaced:
    """A tensor that the adapter saves whole: of `modules_to_save`, a trained bias, a resized embedding."""

    raw: Raw
    key: str
    shape: tuple[int, ...]

    def apply(self, values: torch.Tensor, start: int) -> None:
        """Overwrite `values` with the adapter's, from element `start` of the tensor on."""
        dtype, bits = self.raw(self.key)
        values.copy_(as_tensor(dtype, bits.reshape(-1)[start : start + values.numel()].copy()))


@dataclass(frozen=True)
class NewRows:
    """Trained rows of an embedding that replace the rows of some tokens.

    Attributes:
        ids: the token of each row.
        shape: of the embedding.
    """

    raw: Raw
    key: str
    ids: Sequence[int]
    shape: tuple[int, ...]

    def apply(self, values: torch.Tensor, start: int) -> None:
        """Write the rows into `values`, the whole embedding."""
        dtype, bits = self.raw(self.key)
        values.view(self.shape)[torch.tensor(self.ids, dtype=torch.int64)] = as_tensor(dtype, bits.copy()).float()


@dataclass(frozen=True)
class AddedBias:
    """`scale * b`, added to a bias: the bias of lora_B."""

    raw: Raw
    key: str
    scale: float
    shape: tuple[int, ...]

    def apply(self, values: torch.Tensor, start: int) -> None:
        """Add the bias to `values`."""
        dtype, bits = self.raw(self.key)
        values.add_(as_tensor(dtype, bits[start : start + values.numel()].copy()).float().mul_(self.scale))


@dataclass(frozen=True)
class LowRank:
    """`scale * B @ A` in fp32, added to a weight; with a magnitude, DoRA.

    DoRA (arXiv 2402.09353) makes the weight `m * (W + scale * B @ A) / ||W + scale * B @ A||`, whose norm is over the
    inputs of each output; of an embedding, PEFT takes it over the tokens of each dimension.

    Attributes:
        raw: reads the adapter's file.
        a, b: keys of lora_A, shape (rank, in), and lora_B, shape (out, rank).
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).
        shape: of the weight as it is stored: (out, in), or (in, out) if it is `transposed`.
        transposed: whether the weight is stored as (in, out): an embedding, GPT-2's Conv1D, some stacks of experts.
        magnitude: key of m, one for each output, if it is DoRA.
        stack: how many experts the weight has, in its first dimension; 0 if it is one matrix. PEFT stores their factors
            as one pair: expert e has the rows from e * rank on of A, and every `stack`-th column from e on of B.
    """

    raw: Raw
    a: str
    b: str
    scale: float
    shape: tuple[int, ...]
    transposed: bool = False
    magnitude: str | None = None
    stack: int = 0

    @property
    def needs_whole(self) -> bool:
        """Whether the change needs the whole weight: the norms of DoRA are over all rows."""
        return self.transposed and self.magnitude is not None

    def delta(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the flat values `start` to `stop` (exclusive) of the delta, fp32; they must be whole rows."""
        columns, rows_of_one = self.shape[-1], self.shape[-2]
        first, last = start // columns, (prod(self.shape) if stop is None else stop) // columns
        if not self.stack:
            return self._rows(None, first, last).reshape(-1)
        found = []
        while first < last:
            expert, row = divmod(first, rows_of_one)
            end = min(rows_of_one, row + last - first)
            found.append(self._rows(expert, row, end).reshape(-1))
            first += end - row
        return torch.cat(found)

    def factor(self) -> torch.Tensor | None:
        """Return F, fp32 (rank, in), with F^T F = D^T D for D = scale * B @ A; None with a magnitude or for a stack."""
        if self.magnitude is not None or self.stack:
            return None
        a, b = self._factors(None)
        with one_thread():
            return (torch.linalg.qr(b, mode="r").R @ a).mul_(self.scale)

    def apply(self, values: torch.Tensor, start: int) -> None:
        """Add the delta to `values`; with a magnitude, also set their norms."""
        values.add_(self.delta(start, start + values.numel()))
        if self.magnitude is None:
            return
        dtype, bits = self.raw(self.magnitude)
        wanted, matrix = as_tensor(dtype, bits.reshape(-1).copy()).float(), values.view(-1, self.shape[-1])
        with one_thread():
            if self.transposed:
                matrix.mul_((wanted / torch.linalg.norm(matrix, dim=0))[None])
            else:
                row = start // self.shape[-1]
                norms = torch.linalg.norm(matrix, dim=1)
                matrix.mul_((wanted[row : row + len(norms)] / norms)[:, None])

    def _rows(self, expert: int | None, first: int, last: int) -> torch.Tensor:
        """Return rows `first` to `last` (exclusive) of one matrix's delta, in the layout of the stored weight."""
        a, b = self._factors(expert)
        with one_thread():  # several threads would change the order of sums even in small products
            if not self.transposed:
                return (b[first:last] @ a).mul_(self.scale)
            delta = (b @ a[:, first:last]).mul_(self.scale)
        return delta.T.contiguous()

    def _factors(self, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        (dtype_a, a), (dtype_b, b) = self.raw(self.a), self.raw(self.b)
        if expert is not None:
            rank = a.shape[0] // self.stack
            a, b = a[expert * rank : (expert + 1) * rank], b[:, expert :: self.stack]
        return as_tensor(dtype_a, a.copy()).float(), as_tensor(dtype_b, b.copy()).float()
