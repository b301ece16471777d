"""Which elements of a task vector are kept."""

import numpy as np
import torch

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, so that i -> i * _SPREAD mod 2^64 is a permutation


def trim(task_vector: torch.Tensor, density: float) -> torch.Tensor:
    """Keep exactly `k = int(density * n)` of the `n` elements, those of the largest magnitude; the others become 0.

    Equal magnitudes at the threshold (the difference of two bf16 weights takes few values) are broken by a fixed
    permutation of the flat index, `i * 0x9E3779B97F4A7C15 mod 2^64`, smallest first: the same on every machine, and
    spread over the tensor, where "lowest index first" would favour its first rows.

    Args:
        task_vector: fp32, any shape, finite.
        density: fraction kept, in [0, 1].

    Returns:
        fp32, same shape; a new tensor, or `task_vector` itself if all is kept.
    """
    n = task_vector.numel()
    k = int(density * n)
    if k >= n:
        return task_vector
    if k <= 0:
        return torch.zeros_like(task_vector)
    magnitude = np.abs(task_vector.detach().cpu().reshape(-1).numpy())
    threshold = np.partition(magnitude, n - k)[n - k]
    keep = magnitude > threshold
    ties = np.flatnonzero(magnitude == threshold)
    wanted = k - int(keep.sum())
    if wanted < ties.size:
        order = ties.astype(np.uint64) * _SPREAD
        ties = ties[np.argpartition(order, wanted - 1)[:wanted]]
    keep[ties] = True
    mask = torch.from_numpy(keep).reshape(task_vector.shape).to(task_vector.device)
    return torch.where(mask, task_vector, 0.0)


def drop(task_vector: torch.Tensor, density: float, stream: np.random.Generator) -> torch.Tensor:
    """Keep each element with probability `density`, independently; the others become 0.

    Args:
        task_vector: fp32, any shape.
        density: probability of being kept, in [0, 1].
        stream: the expert's own random stream; one fp32 uniform number is drawn for each element, in flat order.

    Returns:
        fp32, same shape; not rescaled.
    """
    if density >= 1:
        return task_vector
    keep = stream.random(task_vector.numel(), dtype=np.float32) < density
    mask = torch.from_numpy(keep).reshape(task_vector.shape).to(task_vector.device)
    return torch.where(mask, task_vector, 0.0)


def match_l1(kept: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Scale `kept` to the L1 norm of `whole` (mergekit's `rescale`), summed in fp64 so that nothing overflows."""
    before = float(whole.abs().sum(dtype=torch.float64))
    after = float(kept.abs().sum(dtype=torch.float64))
    return kept if after == 0 or before == after else kept * (before / after)
