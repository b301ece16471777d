"""Forward passes that stop in front of every block, and record the inputs of the projections on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakValueDictionary

from greenlet import getcurrent, greenlet

from lewis.lazy_torch import nn, torch
from lewis.models.network.module_tree import Network

if TYPE_CHECKING:
    from lewis.importance.batches import Batch

_OF_RUN: WeakValueDictionary[greenlet, Stepping] = WeakValueDictionary()


@dataclass(eq=False)
class Stepping:
    """A forward pass of one batch that can be paused and resumed.

    Attributes:
        batch: the batch.
        forward: runs the model on it.
        place: path of the module that the pass waits in front of; None at its end.
    """

    batch: Batch
    forward: Callable[[], None]
    place: str | None = None
    _run: greenlet | None = None

    @classmethod
    def current(cls) -> Self | None:
        """The pass that is running now; None if it is not of this class, or no pass is running."""
        found = _OF_RUN.get(getcurrent())
        return found if isinstance(found, cls) else None

    def advance(self) -> Any:
        """Resume the pass until it calls `wait`.

        A greenlet cannot change threads, so call this from the thread that started it.

        Returns:
            The value that was given to `wait`; None when the forward pass has ended.
        """
        if self._run is None:
            self._run = greenlet(self.forward)
            _OF_RUN[self._run] = self
        value = self._run.switch()
        return None if self._run.dead else value

    def stop(self) -> None:
        """End the pass if it waits; call this from the thread that started it."""
        if self._run is not None and not self._run.dead:
            self._run.throw()


def wait(value: Any) -> None:
    """Pause the pass that is running; the `advance` that resumed it returns `value`."""
    getcurrent().parent.switch(value)


def wait_at(path: str, *_: object) -> None:
    """A forward pre-hook of the module `path`: pause in front of it."""
    wait(path)


@dataclass(eq=False)
class Pass(Stepping):
    """A forward pass of one batch that stops in front of every block, and records the inputs of projections.

    Attributes:
        inputs: recorded since `forget`: name of the first projection that got a tensor -> copies of its rows of real
            tokens, fp32 (tokens, in).
        sources: name of a projection -> the key in `inputs` of the tensor that it got; empty if it got several.
    """

    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    _seen: list[tuple[torch.Tensor, bool, str]] = field(default_factory=list)
    _mode: Any = None

    def go_on(self) -> None:
        """Run to the next block; always in the same thread."""
        self.place = self.advance()

    def stop(self) -> None:
        """End the pass if it waits, in the thread that started it, and drop the recorded inputs."""
        super().stop()
        self.forget()

    def forget(self) -> None:
        """Drop the recorded inputs."""
        self.inputs, self.sources, self._seen = {}, {}, []

    def note(self, name: str, inputs: torch.Tensor, routed: bool = False) -> None:
        """Record the inputs of a projection; an input that several share (q, k, v) is copied once.

        Args:
            name: of the projection.
            inputs: (samples, width, in), or what a router sends to it.
            routed: whether a router chose them: then their weights are unknown, and all count alike.
        """
        path = name.removesuffix(".weight")
        weighted = not routed and self.batch.weighs(path)
        key = next((key for tensor, alike, key in self._seen if tensor is inputs and alike == weighted), None)
        if key is None:
            key = name
            self._seen.append((inputs, weighted, name))
            rows = self.batch.rows_of(inputs, name)
            rows = self.batch.weighted(rows, path) if weighted else rows
            copied = rows.clone() if rows.data_ptr() == inputs.data_ptr() else rows  # a model may overwrite it later
            self.inputs.setdefault(name, []).append(copied)
        self.sources[name] = key if self.sources.get(name, key) == key else ""


class Watched(ExitStack):
    """A context in which a network's passes stop in front of its blocks and record the inputs of covered projections.

    Attributes:
        notes: whether inputs are recorded.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.notes = True
        for path, block in network.blocks.items():
            self.callback(block.register_forward_pre_hook(partial(wait_at, path)).remove)
        stacked: dict[nn.Module, list[str]] = {}
        for parameter in dict.fromkeys(covered.parameter for covered in network.covered if not covered.stack):
            path, _, name = parameter.rpartition(".")
            module = network.module.get_submodule(path)
            if getattr(module, name).dim() == 3:
                stacked.setdefault(module, []).append(parameter)
            else:  # blocks may share a weight (Zamba)
                paths = [each.rpartition(".")[0] for each in network.same(parameter)]
                for shared in dict.fromkeys(map(network.module.get_submodule, paths)):
                    self.callback(shared.register_forward_pre_hook(partial(self._before, parameter)).remove)
        for module, parameters in stacked.items():
            self.callback(module.register_forward_pre_hook(partial(self._before_experts, parameters)).remove)
            self.callback(module.register_forward_hook(_after_experts, always_call=True).remove)

    def _before(self, parameter: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.notes:
            _running().note(parameter, inputs[0])

    def _before_experts(self, parameters: Sequence[str], module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A hook for stacked experts, which are no modules but one parameter: watch products with its slices."""
        if not self.notes:
            return
        run = _running()
        run._mode = see_experts(module, parameters, lambda _, projection, rows: run.note(projection, rows, routed=True))
        run._mode.__enter__()


def see_experts(
    module: nn.Module, parameters: Sequence[str], note: Callable[[str, str, torch.Tensor], None]
) -> AbstractContextManager[Any]:
    """A context in which `note` is called before each product of inputs with a slice of a stacked parameter.

    Args:
        module: the module that runs in the context.
        parameters: full names of its stacked parameters.
        note: called before each product with the parameter, the name of the projection and its inputs, (tokens, in).
    """
    from lewis.importance.second_moments import SeeProducts

    stacks = {getattr(module, name.rpartition(".")[2]).untyped_storage().data_ptr(): name for name in parameters}

    def see(rows: torch.Tensor, weight: torch.Tensor) -> None:
        name = stacks.get(weight.untyped_storage().data_ptr())
        if name is not None and rows.dim() == 2:
            note(name, of_expert(name, weight.storage_offset() // weight.numel()), rows)

    return SeeProducts(see)


def of_expert(parameter: str, expert: int | None) -> str:
    """The name of a projection: the parameter's, and for one of stacked experts its number in brackets."""
    return parameter if expert is None else f"{parameter}[{expert}]"


def _after_experts(*_: Any) -> None:
    run = _running()
    if run._mode is not None:
        run._mode.__exit__(None, None, None)
        run._mode = None


def _running() -> Pass:
    run = Pass.current()
    assert run is not None  # hooks are called only while a pass runs
    return run
