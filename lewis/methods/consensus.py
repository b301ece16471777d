"""Consensus merging with TALL masks: keep the elements that several experts claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.sums import add_up
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import Count, NotNegative, PerExpert, Scales, column, merge_method, per_expert
from lewis.methods.ties import trim_all


def can_agree(values: Mapping[str, Any], experts: int) -> str | None:
    """Check that `min_agree` is not more than the number of experts."""
    if values["min_agree"] <= experts:
        return None
    return f"expected min_agree <= {experts}, the number of experts, got min_agree={values['min_agree']}"


@merge_method(
    "consensus",
    paper="https://arxiv.org/abs/2405.07813",
    experts=(2, None),
    check=can_agree,
    in_mergekit=False,
    compiled=Loops(Combine.CLAIM, threshold="tall_lambda", at_least="min_agree"),
)
def consensus(
    task_vectors: torch.Tensor,
    scales: Scales = None,
    *,
    density: PerExpert[float] = 1.0,
    weight: PerExpert[float] = 1.0,
    lambda_: float = 1.0,
    tall_lambda: NotNegative = 0.4,
    min_agree: Count = 2,
) -> torch.Tensor:
    """Add the task vectors up, and keep the sum where at least `min_agree` experts claim it.

    With tau = sum_i w_i tau_i, expert i claims an element where |w_i tau_i| > tall_lambda * |tau - w_i tau_i|: its own
    change is large compared with the others'. An element that only one expert claims ("selfish"), or none, is left out.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        scales: of each expert, as in `sparsify.size`.
        density: fraction of each task vector that is kept, largest size first, before the masks are made.
        weight: w_i.
        lambda_: scale of the merged delta.
        tall_lambda: how selective the masks are (the authors search 0.2 to 0.6).
        min_agree: experts that must claim an element.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.

    Raises:
        ValueError: if `min_agree` is more than there are experts.
    """
    if problem := can_agree({"min_agree": min_agree}, len(task_vectors)):
        raise ValueError(problem)
    kept = trim_all(task_vectors, scales, density)
    weighted = kept * column(per_expert(weight, task_vectors), kept)
    together = add_up(weighted)
    claims = weighted.abs() > tall_lambda * (together - weighted).abs()
    return torch.where(claims.sum(dim=0) >= min_agree, together, 0.0) * lambda_
