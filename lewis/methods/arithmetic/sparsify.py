"""Sparsification: which elements of a task vector are kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.streams import Stream
from lewis.methods.arithmetic.sums import divided, total

SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, so that i -> i * SPREAD mod 2^64 is a permutation


def trim(
    task_vector: torch.Tensor, density: float, scale: torch.Tensor | None = None, outliers: float = 0.0
) -> torch.Tensor:
    """Keep exactly `k = int(density * n)` of the `n` elements, those of the largest score; the others become 0.

    The score is that of `size`. Unlike mergekit, which keeps at least one element, a share of less than one element
    keeps none: a density is never exceeded.

    Args:
        task_vector: fp32, any shape, finite.
        density: fraction kept, in [0, 1]; 1 keeps all, outliers too.
        scale: as in `size`.
        outliers: fraction of the largest scores that is dropped first, in [0, 1]; less where fewer than k would be
            left.

    Returns:
        fp32, same shape; a new tensor, or `task_vector` itself if all is kept.
    """
    n = task_vector.numel()
    k = int(density * n)
    if k >= n:
        return task_vector
    score, dropped = size(task_vector, scale), min(int(outliers * n), n - k)
    keep = largest(score, dropped + k)
    if dropped:
        keep &= ~largest(score, dropped)
    return torch.where(keep, task_vector, 0.0)


def size(task_vector: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The score that elements are trimmed by: the magnitude, times `scale` if given.

    With scale = sqrt(mean x^2) of the layer's inputs it is Wanda's score (arXiv 2306.11695) on the task vector,
    |delta| * sqrt(s).

    Args:
        task_vector: fp32, any shape.
        scale: fp32, not negative, broadcasts to the task vector: (in_features,) for a linear layer; or None.

    Returns:
        fp32, same shape.
    """
    return task_vector.abs() if scale is None else task_vector.abs() * scale


def largest(score: torch.Tensor, k: int) -> torch.Tensor:
    """Which `k` elements have the largest score: exactly `k`, and a larger `k` keeps a superset.

    Equal scores at the threshold (the difference of two bf16 weights takes few values) are broken by a fixed
    permutation of the flat index, `i * 0x9E3779B97F4A7C15 mod 2^64`, smallest first: the same on every machine, and
    spread over the tensor, where "lowest index first" would favour its first rows.

    Args:
        score: fp32, any shape, no NaN.
        k: in [0, n].

    Returns:
        bool, same shape.
    """
    n = score.numel()
    if k <= 0 or k >= n:
        return torch.full_like(score, k > 0, dtype=torch.bool)
    if score.device.type != "cpu":
        return _largest_on_gpu(score.detach().reshape(-1), k).reshape(score.shape)
    values = score.detach().reshape(-1).numpy()
    threshold = np.partition(values, n - k)[n - k]
    keep = values > threshold
    ties = np.flatnonzero(values == threshold)
    wanted = k - int(keep.sum())
    if wanted < ties.size:
        order = ties.astype(np.uint64) * SPREAD
        ties = ties[np.argpartition(order, wanted - 1)[:wanted]]
    keep[ties] = True
    return torch.from_numpy(keep).reshape(score.shape)


def _largest_on_gpu(values: torch.Tensor, k: int) -> torch.Tensor:
    """`largest` for flat values that are on a GPU."""
    threshold = values.kthvalue(len(values) - k + 1).values
    keep = values > threshold
    ties, wanted = (values == threshold).nonzero().reshape(-1), k - int(keep.sum())
    order = tie_order(ties)
    keep[ties[order <= order.kthvalue(wanted).values]] = True
    return keep


def tie_order(places: torch.Tensor) -> torch.Tensor:
    """The place of each tie in the order of `largest`: int64, shifted so that signed comparison gives that order."""
    return places * int(SPREAD.view(np.int64)) ^ torch.iinfo(torch.int64).min


def drop(task_vector: torch.Tensor, density: float, stream: Stream) -> torch.Tensor:
    """Keep each element with probability `density`, independently; the others become 0.

    Args:
        task_vector: fp32, any shape.
        density: probability of being kept, in [0, 1].
        stream: the expert's own random stream; one number is drawn for each element, in flat order.

    Returns:
        fp32, same shape; not rescaled.
    """
    if density >= 1:
        return task_vector
    keep = _uniform(task_vector, stream) < density
    return torch.where(keep, task_vector, 0.0)


def drop_by_rank(
    task_vector: torch.Tensor, density: float, epsilon: float, stream: Stream, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Keep each element with a probability that grows with the rank of its size in its row (DELLA's MagPrune).

    From the smallest to the largest element of a row the probability rises linearly from `density - epsilon` to
    `density + epsilon`; its mean is the density. Equal sizes get the mean of their ranks, so the place of an element
    does not matter. The only element of a row gets the density.

    Args:
        task_vector: fp32, any shape; a row is its last dimension.
        density: mean probability of being kept, in [0, 1]; 0 and 1 drop and keep all.
        epsilon: half the width of the probabilities.
        stream: as in `drop`.
        scale: as in `size`.

    Returns:
        fp32, same shape; not rescaled.
    """
    if density >= 1:
        return task_vector
    if density <= 0:
        return torch.zeros_like(task_vector)
    score = torch.atleast_1d(size(task_vector, scale))
    ordered = score.sort(dim=-1).values
    below, up_to = (torch.searchsorted(ordered, score, right=side, out_int32=True) for side in (False, True))
    last = score.shape[-1] - 1
    rank = divided((below + up_to - 1).to(torch.float32), 2 * last) if last else torch.full_like(score, 0.5)
    keep = _uniform(score, stream) < (density - epsilon) + rank * (2 * epsilon)
    return torch.where(keep.reshape(task_vector.shape), task_vector, 0.0)


def stack_kept(kept: Iterable[torch.Tensor], task_vectors: torch.Tensor, *, rescale: bool) -> torch.Tensor:
    """Stack the kept parts of all task vectors, (experts, *shape); `rescale` scales each to its vector's L1 norm."""
    each = zip(kept, task_vectors, strict=True)
    return torch.stack([match_l1(own, whole) if rescale else own for own, whole in each])


def match_l1(kept: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Scale `kept` to the L1 norm of `whole` (mergekit's `rescale`), summed in fp64: mergekit's fp16 sum overflows."""
    before, after = total(whole.abs()), total(kept.abs())
    return kept if after == 0 or before == after else kept * (before / after)


def _uniform(task_vector: torch.Tensor, stream: Stream) -> torch.Tensor:
    numbers = stream.random(task_vector.numel())
    return torch.from_numpy(numbers).reshape(task_vector.shape).to(task_vector.device)
