"""Arcee Fusion: take over the changes that matter most, by a threshold that each tensor sets itself."""

from __future__ import annotations

from lewis.lazy import torch
from lewis.methods.registry import merge_method

_EPSILON = 1e-8  # added to probabilities whose logarithm is taken
_BLOCK = 2**17  # elements of a block of rows, which stays in the cache


@merge_method("arcee_fusion", paper="https://arcee.ai", experts=(1, 1))
def arcee_fusion(task_vectors: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Keep the elements of the task vector with importance >= median + 1.5 * (third - first quartile).

    The importance of an element is |delta| times the Kullback-Leibler divergence of its row, softmax(W) against
    softmax(W_base). It is computed in fp64: for the small deltas of a fine-tune mergekit's fp32 divergence is mostly
    rounding. Quartiles are exact: of a tensor of over a million elements mergekit draws a million without a seed, so
    that each run differs.

    Args:
        task_vectors: fp32, shape (1, *tensor.shape).
        base: fp32, shape tensor.shape.

    Returns:
        fp32 delta to add to the base, shape tensor.shape.
    """
    delta = task_vectors[0]
    information = divergence(delta, base)
    scores = delta.abs() * information
    first, median, third = quartiles(scores)
    del scores  # is as large as two models
    kept = torch.empty_like(delta)
    every = (x.reshape(-1, _width(delta)).split(_rows(delta)) for x in (kept, delta))
    for out, part, row in zip(*every, information.reshape(-1, 1).split(_rows(delta)), strict=True):
        out.copy_(torch.where(part.abs() * row >= median + 1.5 * (third - first), part, 0.0))
    return kept


def quartiles(scores: torch.Tensor) -> list[float]:
    """The elements a quarter, half and three quarters of the way up, rounded down; may leave `scores` in disorder."""
    flat = scores.cpu().reshape(-1).numpy()
    first, middle, third = (int(share * (flat.size - 1)) for share in (0.25, 0.5, 0.75))
    flat.partition(middle)  # one place at a time: three at once are much slower
    below, above = flat[:middle], flat[middle + 1 :]
    if first < middle:
        below.partition(first)
    if third > middle:
        above.partition(third - middle - 1)
    return [float(flat[place]) for place in (first, middle, third)]


def importance(task_vector: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """|delta| * KL(softmax(W) || softmax(W_base)) of the row (the last dimension).

    Returns:
        fp64, shape tensor.shape.
    """
    return task_vector.abs() * divergence(task_vector, base)


def divergence(task_vector: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(softmax(W) || softmax(W_base)) of each row (the last dimension).

    Returns:
        fp64, shape (*tensor.shape[:-1], 1); of a single number, shape ().
    """
    found = []
    for delta, old in zip(*(x.reshape(-1, _width(x)).split(_rows(x)) for x in (task_vector, base)), strict=True):
        p, q = (torch.softmax(x.double(), dim=-1).add_(_EPSILON) for x in (old + delta, old))
        found.append((p * (p / q).log_()).sum(dim=-1))
    return torch.cat(found).reshape((*base.shape[:-1], 1) if base.dim() else ())


def _width(tensor: torch.Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() else 1


def _rows(tensor: torch.Tensor) -> int:
    return max(1, _BLOCK // _width(tensor))
