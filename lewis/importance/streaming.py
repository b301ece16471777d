"""Running a model that need not fit in memory: weights of a block are read when the passes reach it, then dropped."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from lewis.errors import InputError
from lewis.importance.architecture import Network
from lewis.models.lora import LoraExpert
from lewis.models.model import Model

_ROOM = 64 << 20  # bytes; a micro-batch takes more while it goes through a block of a small model


class Streamed:
    """A network with its weights, as a context: at any time in memory are those outside of the blocks, and one block.

    Where all of it fits on a GPU, everything is kept there instead.
    """

    def __init__(self, network: Network, model: Model, device: str, dtype: torch.dtype, *, keep: bool = True) -> None:
        """
        Args:
            network: on the meta device.
            model: that has its weights.
            device, dtype: where and in what the passes compute.
            keep: whether the weights may stay in a GPU's memory.
        """
        self._network, self._model, self._device, self._dtype = network, model, device, dtype
        self._hooks = ExitStack()
        self._runs: list[greenlet] = []
        self._keep = keep and device != "cpu" and self._fits()

    def __enter__(self) -> "Streamed":
        self._check()
        network = self._network
        self._load(network.parameters_outside())
        for path, block in network.blocks.items():
            if self._keep:
                self._load(network.parameters_in(path))
            else:
                self._hooks.callback(block.register_forward_pre_hook(partial(_wait, path)).remove)
        for module in network.module.modules():  # tables of rotary embeddings and the like
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:  # of a round that was stopped: end what waits here, in its own thread
            run.throw()
        self._hooks.close()

    @property
    def room(self) -> int:
        """Bytes that may wait between two blocks: those of the largest block, at least 64 MiB.

        0 if waiting saves nothing, since the weights stay in memory.
        """
        network = self._network
        sizes = [sum(network.empty(name).numel() for name in network.parameters_in(path)) for path in network.blocks]
        return 0 if self._keep else max(_ROOM, max(sizes) * self._dtype.itemsize)

    def lock_step(self, forwards: Sequence[Callable[[], None]], turn: Callable[[int], None]) -> Iterator[float]:
        """Run forward passes side by side: all go through a block, one after another, before one goes on to the next.

        Each pass is a greenlet, a coroutine that can stop anywhere below its first call: at the entry of a block, in
        the code of whatever model it is. All are in this thread, and share its settings, its memory and OpenMP's pool.

        Args:
            forwards: each runs the network once.
            turn: called with the index of the pass that goes on now.

        Yields:
            After each block, the share of the blocks that all have passed.
        """
        runs = self._runs = [greenlet(forward) for forward in forwards]
        places, passed = [], 0  # the block that each waits at; None at its end
        for i, run in enumerate(runs):
            turn(i)
            places.append(run.switch())
        while path := next(filter(None, places), None):
            names = self._network.parameters_in(path)
            self._load(names)
            for i, run in enumerate(runs):
                if places[i] == path:
                    turn(i)
                    places[i] = run.switch()
            self._drop(names)
            passed += 1
            yield min(1.0, passed / len(self._network.blocks))

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


def _wait(path: str, *_: object) -> None:
    """Let others go on, until it is this pass's turn to enter the block `path`."""
    getcurrent().parent.switch(path)


def _put(network: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
