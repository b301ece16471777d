"""Which projections write into the residual stream, and where a pass can read the stream before they do.

The search sends tokens through the network on the meta device, where nothing is computed. A projection writes into the
stream if its unchanged output is added to a tensor that went into another module before (the block, or its norm) and is
no projection's output itself. Where a model scales or normalises the output first (Granite, Gemma), or adds two outputs
in one step (GPT-NeoX), no projection is found, and a fit corrects no residual.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

from torch.overrides import TorchFunctionMode

from lewis.errors import InputError
from lewis.importance.streaming import forward
from lewis.lazy_torch import nn, torch
from lewis.models.network.module_tree import Network

logger = logging.getLogger(__name__)
_ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_OF_VALUES: dict[str, Any] = {"item": 1, "__bool__": True, "__int__": 0, "__index__": 0, "__float__": 0.0}


def writers(network: Network, places: Collection[str]) -> dict[str, str]:
    """Map each projection that writes into the residual stream to a module whose input is the stream before, by path.

    Args:
        network: not to be used afterwards, since its buffers are moved to the meta device, too.
        places: paths of the projections.
    """
    network.module.to("meta")  # buffers, such as the bias of a router
    with ExitStack() as contexts, torch.inference_mode():
        seen = contexts.enter_context(_Additions(network, places, contexts))
        try:
            forward(network, torch.zeros(1, 4, dtype=torch.long, device="meta"), [4])
        except (RuntimeError, NotImplementedError, TypeError, InputError) as error:  # operations that need values
            logger.info("%s: the residual stream is not corrected: %s", network.folder, str(error).split("\n")[0])
            return {}
        return seen.found()


class _Additions(TorchFunctionMode):
    """Records, by identity of tensors, every addition, every input of a module and every output of a projection."""

    def __init__(self, network: Network, places: Collection[str], contexts: ExitStack) -> None:
        super().__init__()
        self._added: list[tuple[int, int]] = []
        self._outputs, self._inputs = dict[int, str](), dict[int, str]()
        self._kept: list[Any] = []  # recorded tensors must not be freed, or a new tensor could get the same id
        for block in network.blocks:
            for name, module in network.module.get_submodule(block).named_modules():
                path = f"{block}.{name}" if name else block
                if path in places:
                    contexts.callback(module.register_forward_hook(self._noting_output(path)).remove)
                else:
                    contexts.callback(module.register_forward_pre_hook(self._noting_input(path)).remove)

    def found(self) -> dict[str, str]:
        """Path of a writing projection -> path of a module whose input is the stream before; as `writers` returns."""
        pairs = [pair for added in self._added for pair in (added, added[::-1])]
        return {
            self._outputs[output]: self._inputs[stream]
            for stream, output in pairs
            if output in self._outputs and stream in self._inputs and stream not in self._outputs
        }

    def _noting_output(self, path: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self._outputs[id(output)] = path
            self._kept.append(output)

        return note

    def _noting_input(self, path: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                self._inputs.setdefault(id(inputs[0]), path)
                self._kept.append(inputs[0])

        return note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        # Code that builds the mask asks for values, which a meta tensor lacks; no addition depends on the answer.
        if name in _OF_VALUES and args[0].device.type == "meta":
            return _OF_VALUES[name]
        if name == "nonzero" and args[0].device.type == "meta":  # which experts have tokens: none has any
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        result = function(*args, **(kwargs or {}))
        if name in _ADDITIONS and len(args) > 1 and all(isinstance(each, torch.Tensor) for each in args[:2]):
            self._added.append((id(args[0]), id(args[1])))
            self._kept += args[:2]
        return result
