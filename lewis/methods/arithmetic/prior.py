"""The prior of a layer's regression: the rows of each task vector, which count as if they were inputs of its expert.

A fine-tune moves a weight along the inputs that it saw: D_t = W_t - W_0 is a sum of outer products with them. So its
rows span the inputs that matter to expert t, also those that its few calibration tokens do not hold (`regression`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.tokens import Gram, Rows


def prior_rows(experts: Sequence[Rows | Gram], moved: Sequence[torch.Tensor], strength: float) -> list[Rows]:
    """Return each expert's rows of the prior, whose products are c_t n0 tau_t D_t^T D_t.

    tau_t = tr(X_t^T X_t / tokens) / tr(D_t^T D_t) brings a task vector to the scale of its expert's inputs. An expert
    whose tokens did not reach the layer gets the mean trace of the others; if none did, all get 1.

    Args:
        experts: the tokens of each expert, or their mean products.
        moved: for each expert D_t, or a factor F of it with F^T F = D_t^T D_t, fp32 (rows, in).
        strength: n0, how much all rows of a prior count compared with the tokens of its expert.

    Returns:
        The rows of each expert's prior; no rows if the expert did not change the layer.
    """
    traces = [_trace(each) for each in experts]
    known = [trace for trace in traces if trace > 0]
    mean = sum(known) / len(known) if known else 1.0
    found = []
    for each, trace, rows in zip(experts, traces, moved, strict=True):
        own = float(rows.square().sum(dtype=torch.float64))
        kept = rows if own > 0 else rows[:0]
        share = each.weight * strength * (trace or mean) / own if own > 0 else 0.0
        found.append(Rows([kept], [kept], share * len(kept)))
    return found


def _trace(inputs: Rows | Gram) -> float:
    """tr(X_t^T X_t) / tokens; 0 without tokens."""
    if isinstance(inputs, Gram):
        return float(inputs.mean.diagonal().sum(dtype=torch.float64))
    total = sum(float(part.square().sum(dtype=torch.float64)) for part in inputs.merged)
    return total / max(inputs.tokens, 1)
