"""The tokens of one expert as input of a layer's regression; the symbols are those of `regression`."""

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

    @property
    def shifted(self) -> bool:
        """Always False: the inputs are the expert's own."""
        return False
