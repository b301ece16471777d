"""AIM: after a merge, hold back the input channels that the base uses most."""

from __future__ import annotations

from lewis.lazy_torch import torch


def aim(scale: torch.Tensor, omega: float) -> torch.Tensor:
    """Activation-informed merging (arXiv 2502.02421): the factors 1 - (1 - omega) * scale_j / max scale.

    It is no merge method but a step after any of them (`lewis.aim` in a recipe): the merged delta is multiplied by the
    factor of its input channel, so that channels in which the base's activations are large change less.

    Args:
        scale: fp32, not negative, broadcasts to the delta, as `Method.takes_scales` says: how large the base's
            activations are in each input channel. The paper takes the mean of |x|; sqrt(mean x^2), which LEWIS measures
            anyway, serves as well. Of stacked experts, shape (experts, ., .), each has a maximum of its own.
        omega: in [0, 1]; what is left of the delta in the largest channel. 1 changes nothing.

    Returns:
        fp32, shape of `scale`.
    """
    top = scale.amax(dim=(1, 2), keepdim=True) if scale.dim() == 3 else scale.max()
    return 1 - (1 - omega) * scale / torch.where(top > 0, top, 1.0)
