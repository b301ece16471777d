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
            prune = self._of_block(path)
            self._hooks.callback(block.register_forward_hook(prune, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _of_block(self, path: str) -> Any:
        parameters = [c.parameter for c in self._network.covered if c.parameter.startswith(f"{path}.")]

        def prune(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            for parameter in parameters:
                module = self._network.module.get_submodule(parameter.rpartition(".")[0])
                sums = self._moments.sums[parameter] / self._samples
                weight = module.weight.data
                mask = smallest(weight.abs() * sums.to(weight.dtype).sqrt(), self._ratio)
                module.weight = nn.Parameter(weight.masked_fill(mask, 0), requires_grad=False)
            with self._moments.paused():
                return block.forward(*args, **kwargs)

        return prune


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
