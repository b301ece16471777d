"""The tokens of the experts as input of a layer's regression; the symbols are those of `regression`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lewis.lazy_torch import torch

Additions = Sequence["torch.Tensor"] | None
"""B_t of one expert: one fp32 part for each part of its rows, each (tokens, out); None: 0."""


@dataclass
class Rows:
    """The tokens of one expert at one layer.

    Attributes:
        merged: X_t, fp32: parts whose rows together are the tokens, each (tokens, in).
        own: Z_t, in the same parts; the same objects as `merged` where there is no difference.
        weight: c_t times the number of tokens; c_t itself is `weight / tokens`.
    """

    merged: list[torch.Tensor]
    own: list[torch.Tensor]
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Number of inputs of the layer."""
        return self.merged[0].shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens, one in each row."""
        return sum(len(part) for part in self.merged)

    @property
    def share(self) -> float:
        """c_t, the weight of one token."""
        return self.weight / max(self.tokens, 1)

    @property
    def shifted(self) -> bool:
        """Whether the expert's inputs differ from the merged model's."""
        return any(own is not merged for own, merged in zip(self.own, self.merged, strict=True))


@dataclass
class Gram:
    """The measured mean products of the tokens of one expert at one layer, for a fit with Z_t = X_t and B_t = 0.

    Attributes:
        mean: X_t^T X_t / tokens, fp32 (in, in).
        tokens: number of tokens.
        weight: c_t times the number of tokens.
    """

    mean: torch.Tensor
    tokens: int
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Number of inputs of the layer."""
        return len(self.mean)

    @property
    def share(self) -> float:
        """The weight of `mean` in S: c_t times the number of tokens."""
        return self.weight


class Stacked:
    """X, Z - X and B for the dual form: all experts' rows in one matrix, scaled by sqrt(c_t); of a large layer a share.

    Attributes:
        counts: number of tokens of each expert.
        merged: X, fp32 (tokens, in).
        shift: Z - X, fp32 (tokens, in); None: 0.
        more: B, fp32 (tokens, out); None: 0.
    """

    def __init__(
        self, experts: Sequence[Rows], additions: Sequence[Additions], taken: Sequence[torch.Tensor | None]
    ) -> None:
        """
        Args:
            experts: the tokens of each expert.
            additions: B_t of each expert, the further outputs that the fit is to give for its tokens.
            taken: indices of the tokens to take of each expert, ascending; None for all.
        """
        self.counts = [rows.tokens if kept is None else len(kept) for rows, kept in zip(experts, taken, strict=True)]
        total, size = sum(self.counts), experts[0].size
        scales = [(rows.weight / max(count, 1)) ** 0.5 for rows, count in zip(experts, self.counts, strict=True)]
        self.merged = torch.empty(total, size)
        self.shift = torch.empty(total, size) if any(rows.shifted for rows in experts) else None
        for rows, kept, scale, merged in zip(experts, taken, scales, self.merged.split(self.counts), strict=True):
            _scale(rows.merged, kept, scale, merged)
        if self.shift is not None:
            for rows, kept, scale, own in zip(experts, taken, scales, self.shift.split(self.counts), strict=True):
                _scale(rows.own, kept, scale, own)
            self.shift.sub_(self.merged)
        outputs = next((part.shape[1] for parts in additions for part in parts or ()), None)
        self.more = None if outputs is None else torch.zeros(total, outputs)
        if self.more is not None:
            for parts, kept, scale, out in zip(additions, taken, scales, self.more.split(self.counts), strict=True):
                _scale(parts or (), kept, scale, out)

    @property
    def shifts(self) -> Sequence[torch.Tensor | None]:
        """The rows of `shift` of each expert; None: 0."""
        return [None] * len(self.counts) if self.shift is None else self.shift.split(self.counts)


def within(taken: torch.Tensor, begin: int, length: int) -> torch.Tensor:
    """Indices, within a part of `length` tokens that begins at token `begin`, of those of its tokens that are taken."""
    return taken[(taken >= begin) & (taken < begin + length)] - begin


def _scale(parts: Sequence[torch.Tensor], taken: torch.Tensor | None, scale: float, out: torch.Tensor) -> None:
    """Write the taken rows of all parts, times `scale`, one part below the other."""
    begin = filled = 0
    for part in parts:
        rows = part if taken is None else part[within(taken, begin, len(part))]
        torch.mul(rows, scale, out=out[filled : filled + len(rows)])
        begin, filled = begin + len(part), filled + len(rows)
