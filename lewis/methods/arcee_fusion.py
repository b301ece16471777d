"""Arcee Fusion: take over the changes that matter most, by a threshold that each tensor sets itself."""

from __future__ import annotations

from collections.abc import Iterator

from lewis.lazy import torch
from lewis.methods.registry import merge_method

_EPSILON = 1e-8  # added to probabilities whose logarithm is taken
_BLOCK = 2**15 - 1  # elements of a block of rows: it stays in the cache, and torch does not split it over threads


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
    delta, kept = task_vectors[0], torch.empty(base.shape, device=base.device)
    information = divergence(delta, base)
    first, median, third = quartiles(_scores(delta, information))
    for part, row, out in _blocks(delta, information, kept):
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
    return _scores(task_vector, divergence(task_vector, base))


def _scores(task_vector: torch.Tensor, information: torch.Tensor) -> torch.Tensor:
    scores = torch.empty(task_vector.shape, dtype=torch.float64, device=task_vector.device)
    for part, row, out in _blocks(task_vector, information, scores):
        torch.mul(part.abs(), row, out=out)
    return scores


def divergence(task_vector: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(softmax(W) || softmax(W_base)) of each row (the last dimension).

    Returns:
        fp64, shape (*tensor.shape[:-1], 1); of a single number, shape (1,).
    """
    found = base.new_empty((*base.shape[:-1], 1), dtype=torch.float64)
    for delta, old, out in _blocks(task_vector, base, found):
        p, q = (_softmax(x.double()).add_(_EPSILON) for x in (old + delta, old))
        torch.sum((p / q).log_().mul_(p), dim=-1, keepdim=True, out=out)
    return found


def _softmax(values: torch.Tensor) -> torch.Tensor:
    """In place, of each row; torch's own splits any block over threads."""
    values.sub_(values.amax(dim=-1, keepdim=True)).exp_()
    return values.div_(values.sum(dim=-1, keepdim=True))


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of each, as views of two dimensions; one element or a row of the first one's each."""
    width = tensors[0].shape[-1] if tensors[0].dim() else 1
    rows = max(1, _BLOCK // max(width, 1))
    height = tensors[0].numel() // max(width, 1)
    return zip(*(tensor.reshape(height, -1).split(rows) for tensor in tensors), strict=True)
