"""The rows that the prior of a fit is made of: those of the experts' task vectors, or fewer with the same products."""

from __future__ import annotations

from collections.abc import Sequence

from lewis.lazy_torch import torch
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.regression import DUAL_ABOVE, DUAL_TOKENS
from lewis.models.lora.expert import LoraExpert


def moved_rows(
    merge: Prepared, tensor: str, weights: Sequence[torch.Tensor], base: torch.Tensor, *, part: bool = False
) -> list[torch.Tensor]:
    """Return for each expert rows F with F^T F = D^T D of its task vector D: an adapter's factor, or D itself.

    Args:
        merge: the merge of the experts.
        tensor: name of the tensor.
        weights: the tensor in each expert, fp32 (out, in).
        base: the tensor in the base, fp32 (out, in).
        part: whether `weights` and `base` are only a part of the tensor.

    Returns:
        fp32 (rows, in); of a very wide layer an even share of the rows.
    """
    found, most = [], DUAL_TOKENS // len(merge.experts)
    for expert, weight in zip(merge.experts, weights, strict=True):
        rows = None
        if not part and isinstance(expert.model, LoraExpert) and expert.model.base.key == merge.base.key:
            rows = expert.model.factor(tensor)
        rows = weight - base if rows is None else rows
        if base.shape[1] > DUAL_ABOVE and len(rows) > most:
            rows = rows[torch.arange(most) * len(rows) // most]
        found.append(rows)
    return found
