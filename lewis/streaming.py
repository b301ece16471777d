"""Running a model that need not fit in memory: weights of a block are read when the pass reaches it, then dropped."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lewis.architecture import Network
from lewis.errors import InputError
from lewis.lora import LoraExpert, Model


class Streamed:
    """A network with its weights, as a context: at any time in memory are those outside of the blocks, and one block.

    Where all of it fits on a GPU, everything is kept there instead.
    """

    def __init__(self, network: Network, model: Model, device: str, dtype: torch.dtype) -> None:
        self._network, self._model, self._device, self._dtype = network, model, device, dtype
        self._hooks = ExitStack()
        self._keep = device != "cpu" and self._fits()

    def __enter__(self) -> Any:
        self._check()
        network = self._network
        self._load(network.parameters_outside())
        for path, block in network.blocks.items():
            names = network.parameters_in(path)
            if self._keep:
                self._load(names)
                continue
            for hook in (
                block.register_forward_pre_hook(lambda *_, names=names: self._load(names)),
                block.register_forward_hook(lambda *_, names=names: self._drop(names), always_call=True),
            ):
                self._hooks.callback(hook.remove)
        for module in network.module.modules():  # tables of rotary embeddings and the like
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)
        return network.module

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _fits(self) -> bool:
        needed = sum(info.elements for info in self._model.tensors.values()) * self._dtype.itemsize
        free, _ = torch.cuda.mem_get_info(self._device)
        return needed * 5 // 4 < free

    def _check(self) -> None:
        """Raise InputError unless the model has every weight that the network needs."""
        where = self._model.folder
        if isinstance(self._model, LoraExpert):
            for name in filter(self._model.touches, self._network.unplaced):
                raise InputError(f"{where}: changes {name!r}, which is no parameter of the loaded model")
        needed = [name for path in self._network.blocks for name in self._network.parameters_in(path)]
        for name in filter(self._network.is_parameter, [*self._network.parameters_outside(), *needed]):
            if not any(map(self._network.sources, self._network.same(name))):
                raise InputError(f"{where}: transformers cannot load it: the weight {name!r} is missing")

    def _load(self, names: Iterable[str]) -> None:
        network, done = self._network, set[str]()
        for name in names:
            same = network.same(name)
            source = next(filter(network.sources, same), None)
            if name in done or source is None:
                continue
            value = network.value(source, self._model.read)
            value = value.to(self._device, self._dtype if network.is_parameter(name) else None)
            for each in same:
                _put(network.module, each, value)
            done.update(same)

    def _drop(self, names: Iterable[str]) -> None:
        for name in filter(self._network.is_parameter, names):
            _put(self._network.module, name, self._network.empty(name))


def _put(network: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
