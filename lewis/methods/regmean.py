"""RegMean and its form in forward order: projections fitted to the experts on their calibration rows.

The fit itself is `lewis.methods.arithmetic.regression`. The functions here give the anchor that the fit is pulled
towards, which is also the result for all other tensors (embeddings, norms, biases).
"""

from __future__ import annotations

from lewis.lazy_torch import torch
from lewis.methods.loops import Combine, Loops
from lewis.methods.registry import Fraction, NotNegative, NotNegativeOrAuto, PerExpert, merge_method
from lewis.methods.task_arithmetic import combine

_SUM = Loops(Combine.SUM)


@merge_method(
    "regmean",
    paper="https://arxiv.org/abs/2212.09849",
    elementwise=True,
    compiled=_SUM,
    fits="static",
    in_mergekit=False,
)
def regmean(
    task_vectors: torch.Tensor,
    *,
    weight: PerExpert[NotNegative] = 1.0,
    lambda_: float = 1.0,
    ridge: NotNegativeOrAuto = 0.1,
    prior: NotNegative = 1.0,
    alpha: Fraction = 1.0,
    bound: NotNegative = 6.0,
) -> torch.Tensor:
    """Fit each projection to the experts' outputs for their own inputs, with a ridge towards the sum of task vectors.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        weight: of each expert, in the sum and in the regression.
        lambda_: scale of the sum.
        ridge: pull towards the sum, in units of the mean diagonal of the inputs' products; large values give task
            arithmetic, 0 RegMean. `auto`: found by `lewis.merging.fitting.ridge`.
        prior: how much the directions in which an expert's weights moved count compared with its tokens; 0: not at all.
        alpha: factor of the products of different inputs; 0 treats the inputs of a layer as uncorrelated.
        bound: how far each fitted projection may be from the sum, in units of the distance of the expert that is
            farthest from it (Frobenius norms); a fit beyond it gets a larger ridge. 0: any distance.

    Returns:
        fp32 delta to add to the base, of the anchor and of tensors that are not fitted, shape tensor.shape.
    """
    return combine(task_vectors, weight, normalize=False, lambda_=lambda_)


@merge_method(
    "regmean_forward",
    paper="https://arxiv.org/abs/2605.13030",
    elementwise=True,
    compiled=_SUM,
    fits="forward",
    in_mergekit=False,
)
def regmean_forward(
    task_vectors: torch.Tensor,
    *,
    weight: PerExpert[NotNegative] = 1.0,
    lambda_: float = 1.0,
    ridge: NotNegativeOrAuto = 0.01,
    prior: NotNegative = 1.0,
    alpha: Fraction = 1.0,
    bound: NotNegative = 6.0,
    residual: Fraction = 1.0,
) -> torch.Tensor:
    """Fit each projection, from the first block on, to the experts' outputs, for the inputs of the merged model.

    Args:
        task_vectors: fp32, shape (experts, *tensor.shape).
        weight, lambda_, ridge, prior, alpha, bound: as of `regmean`.
        residual: in [0, 1]. The merged model's residual stream differs from the experts'; the layers that write into
            it are fitted to correct this share of the difference.

    Returns:
        fp32 delta to add to the base, of the anchor and of tensors that are not fitted, shape tensor.shape.
    """
    return regmean(task_vectors, weight=weight, lambda_=lambda_)
