"""Pruning a model while it is measured, as the authors of LEWIS do: Wanda (arXiv 2306.11695), layer by layer."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from lewis.errors import InputError
from lewis.importance.second_moments import SecondMoments
from lewis.models.network.module_tree import Network


class PruneAfter:
    """Prune each block once its inputs are measured, and let the pruned block's output feed the next; as a context.

    The whole calibration set has to go through in one batch.
    """

    def __init__(self, network: Network, moments: SecondMoments, ratio: float) -> None:
        """
        Args:
            network: whose blocks are pruned.
            moments: sums up the inputs of the whole blocks; it is paused while a pruned block runs.
            ratio: of each row's weights, the share that is set to 0; at 0 nothing is done.
        """
        self._network, self._moments, self._ratio = network, moments, ratio
        self._hooks = ExitStack()

    def __enter__(self) -> "PruneAfter":
        if not self._ratio:
            return self
        whole = self._network.unconverted
        if any(covered.stack or whole.get(covered.tensor) != covered.parameter for covered in self._network.covered):
            raise InputError(
                "lewis.importance.prune_ratio: stacked experts cannot be pruned in the pass, nor tensors that "
                "transformers cuts or joins; set it to 0"
            )
        if _adds_positions_to_heads(self._network.module.config):
            raise InputError(
                "lewis.importance.prune_ratio: a model that adds its positions to the heads (ALiBi) cannot be run by "
                "single samples; set it to 0"
            )
        for path, block in self._network.blocks.items():
            self._hooks.callback(delattr, block, "forward")
            block.forward = self._in_place_of(path, block.forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _in_place_of(self, path: str, forward: Any) -> Any:
        covered = {c.parameter: c for c in self._network.covered if c.parameter.startswith(f"{path}.")}

        def measured_then_pruned(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            lengths, width, weights = self._moments.lengths, self._moments.width, self._moments.weights
            modules = {name: self._network.module.get_submodule(name.rpartition(".")[0]) for name in covered}
            means = {name: _RunningMean(module) for name, module in modules.items()}
            # One sample at a time, as the authors do: products of another size are rounded otherwise. That can swap
            # two nearly equal scores, and the effect grows with the depth.
            for i, length in enumerate(lengths):
                self._moments.begin([length], width, None if weights is None else weights[i : i + 1])
                forward(*_sample((hidden, *args), i, len(lengths)), **_sample(kwargs, i, len(lengths)))
            self._moments.begin(lengths, width, weights)
            for name, module in modules.items():
                weight, transposed = module.weight.data, covered[name].transposed
                mask = smallest((weight.T if transposed else weight).abs() * means[name].stop().sqrt(), self._ratio)
                pruned = weight.masked_fill(mask.T if transposed else mask, 0)
                module.weight = nn.Parameter(pruned, requires_grad=False)
            with self._moments.paused():
                return _joined(
                    [
                        forward(*_sample((hidden, *args), i, len(lengths)), **_sample(kwargs, i, len(lengths)))
                        for i in range(len(lengths))
                    ]
                )

        return measured_then_pruned


class _RunningMean:
    """Mean over samples of the sum over tokens of x_j^2, rounded step by step as the authors' code rounds it.

    Which of two nearly equal scores is pruned depends on the last bit, and densities come from small differences of
    norms: with sums in fp64, densities over 30 blocks had a rank correlation of only 0.89 with the authors'.
    """

    def __init__(self, module: nn.Module) -> None:
        self._mean, self._samples = torch.zeros(()), 0
        self._hook = module.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        tokens = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self._mean = self._mean.to(tokens.device) * (self._samples / (self._samples + 1))
        self._samples += 1
        self._mean = self._mean + torch.norm(tokens.t(), p=2, dim=1) ** 2 / self._samples

    def stop(self) -> torch.Tensor:
        """End the sum; returns the mean, fp32 (in,)."""
        self._hook.remove()
        return self._mean


def _adds_positions_to_heads(config: Any) -> bool:
    """Whether a block gets one bias per head and sample in one tensor, which `_sample` cannot split by sample."""
    attention = getattr(config, "attn_config", None)
    return config.model_type == "bloom" or any(getattr(each, "alibi", False) for each in (config, attention))


def _sample(value: Any, i: int, samples: int) -> Any:
    """An argument of a block for sample `i` alone; unchanged if it has no dimension of samples."""
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
    """Mask the int(ratio * columns) smallest elements of each row; among equal elements, the first are taken.

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
