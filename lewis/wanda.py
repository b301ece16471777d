"""Pruning a model while it is measured, as the authors of LEWIS do: Wanda (arXiv 2306.11695), layer by layer."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from lewis.architecture import Network
from lewis.errors import InputError
from lewis.second_moments import SecondMoments


class PruneAfter:
    """Prune each block once its inputs are measured, and let the pruned block's output feed the next; as a context.

    The whole calibration set has to go through in one batch.
    """

    def __init__(self, network: Network, moments: SecondMoments, ratio: float, samples: int) -> None:
        """
        Args:
            network: whose blocks are pruned.
            moments: what is measured; it does not see the second run of a block.
            ratio: of each row's weights, the share that is set to 0; at 0 nothing is done.
            samples: number of samples in the batch.
        """
        self._network, self._moments, self._ratio, self._samples = network, moments, ratio, samples
        self._hooks = ExitStack()

    def __enter__(self) -> "PruneAfter":
        if not self._ratio:
            return self
        if any(covered.expert is not None for covered in self._network.covered):
            raise InputError("lewis.importance.prune_ratio: stacked experts cannot be pruned in the pass; set it to 0")
        for path, block in self._network.blocks.items():
            self._hooks.callback(delattr, block, "forward")
            block.forward = self._in_place_of(path, block.forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _in_place_of(self, path: str, forward: Any) -> Any:
        parameters = [c.parameter for c in self._network.covered if c.parameter.startswith(f"{path}.")]

        def measured_then_pruned(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            lengths, width = self._moments.lengths, self._moments.width
            # One sample at a time, as the authors: a product of another size rounds otherwise, and what that changes
            # in the order of two nearly equal scores grows with the depth.
            for i, length in enumerate(lengths):
                self._moments.begin([length], width)
                forward(*_sample((hidden, *args), i, len(lengths)), **_sample(kwargs, i, len(lengths)))
            self._moments.begin(lengths, width)
            for parameter in parameters:
                module = self._network.module.get_submodule(parameter.rpartition(".")[0])
                sums = self._moments.sums[parameter] / self._samples
                weight = module.weight.data
                mask = smallest(weight.abs() * sums.to(weight.dtype).sqrt(), self._ratio)
                module.weight = nn.Parameter(weight.masked_fill(mask, 0), requires_grad=False)
            with self._moments.paused():
                return _joined(
                    [
                        forward(*_sample((hidden, *args), i, len(lengths)), **_sample(kwargs, i, len(lengths)))
                        for i in range(len(lengths))
                    ]
                )

        return measured_then_pruned


def _sample(value: Any, i: int, samples: int) -> Any:
    """One sample's part of what a block is called with; what all samples share stays."""
    if isinstance(value, torch.Tensor):
        return value[i : i + 1] if value.dim() and value.shape[0] == samples else value
    if isinstance(value, tuple | list):
        return type(value)(_sample(each, i, samples) for each in value)
    return {key: _sample(each, i, samples) for key, each in value.items()} if isinstance(value, dict) else value


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs)
    return tuple(_joined(list(each)) for each in zip(*outputs, strict=True)) if outputs[0] is not None else None


def smallest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which int(ratio * columns) elements of each row are smallest; of equal ones, the first.

    Args:
        scores: shape (rows, columns), no NaN.

    Returns:
        bool, same shape.
    """
    values, k = scores.float().cpu().numpy(), int(ratio * scores.shape[1])
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = np.partition(values, k - 1, axis=1)[:, k - 1 : k]
    below, ties = values < threshold, values == threshold
    wanted = k - below.sum(axis=1, keepdims=True)
    return torch.from_numpy(below | (ties & (ties.cumsum(axis=1) <= wanted))).to(scores.device)
