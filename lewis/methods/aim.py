"""AIM: after a merge, hold back the input channels that the base uses most."""

from __future__ import annotations

from lewis.lazy import torch


def aim(delta: torch.Tensor, scale: torch.Tensor, omega: float) -> torch.Tensor:
    """Activation-informed merging (arXiv 2502.02421): delta_ij * (1 - (1 - omega) * scale_j / max scale).

    It is no merge method but a step after any of them: what the base's activations are large in is changed less.

    Args:
        delta: fp32 merged delta, shape (..., inputs).
        scale: fp32, not negative, shape (inputs,): how large the base's activations are in each input channel. The
            paper takes the mean of |x|; sqrt(mean x^2), which LEWIS measures anyway, serves as well.
        omega: in [0, 1]; what is left of the delta in the largest channel. 1 changes nothing.

    Returns:
        fp32, shape of `delta`.
    """
    top = scale.max()
    return delta * (1 - (1 - omega) * scale / torch.where(top > 0, top, 1.0))
