"""Forward passes that stop in front of every projection, so that many can advance together; and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lewis.errors import LewisError
from lewis.importance.passes import Stepping, wait
from lewis.importance.workers import Workers
from lewis.lazy_torch import nn, torch
from lewis.merging.fitting.fitted import Fitted
from lewis.merging.fitting.spill import Made, Spill
from lewis.merging.prepared import Prepared

if TYPE_CHECKING:
    from lewis.importance.streaming import Weights


@dataclass(eq=False)
class Pass(Stepping):
    """One batch on its way through one model, which stops in front of every block and projection.

    Attributes:
        spill: keeps the tensors that the pass holds while it waits; by default in memory.
        taken_of: number of inputs of a projection -> indices of the tokens to take; None for all. By default all.
        rows: inputs of the projection that it waits for, of the tokens taken, without padding, fp32 (tokens, in).
        taken: indices of these tokens; None for all.
        call: in front of stacked experts: runs their module on the inputs that it gets in this pass.
        streams: path of a module whose input is noted -> its last input without padding, fp32 (tokens, hidden).
        output: output of the module that it waits for, if `run_ahead` has computed it.
        is_new: whether the pass waits with another input tensor than at the place before, or with none.
    """

    spill: Spill = field(default_factory=Spill)
    taken_of: Callable[[int], torch.Tensor | None] | None = None
    rows: torch.Tensor | None = None
    taken: torch.Tensor | None = None
    call: Callable[[], Any] | None = None
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    output: torch.Tensor | None = None
    _raw: torch.Tensor | None = None
    _made: Made = field(default_factory=Made)
    is_new: bool = True

    def go_on(self) -> None:
        """Run to the next place where it stops; always call it in the same thread."""
        with self.spill.watch(self._made):
            stopped_at = self.advance()
        self.place, inputs, self.call = stopped_at or (None, None, None)
        self.spill.move_out(self._made.alive())
        self.is_new = inputs is None or inputs is not self._raw
        if self.is_new:
            self._raw = inputs
            self.taken = self.taken_of(inputs.shape[-1]) if self.taken_of and inputs is not None else None
            self.rows = None if inputs is None else self.spill.keep(self.without_padding(inputs))

    def stop(self) -> None:
        """End the waiting pass, in its own thread."""
        super().stop()
        self._raw = self.rows = self.call = self.output = None
        self.streams = {}

    def run_ahead(self, module: nn.Module) -> torch.Tensor:
        """Run the module that the pass waits for, ahead of its turn. Returns the output without padding, as `rows`.

        In its turn, the module, which `answering` must have changed, returns this output without computing it again.
        """
        assert self._raw is not None
        self.output = self.spill.keep(module.forward(self._raw))
        return self.without_padding(self.output)

    def without_padding(self, inputs: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens that are taken, fp32 (tokens, features)."""
        return self.batch.rows_of(inputs, str(self.place), self.taken)


def advance(passes: Sequence[Pass], workers: Workers, what: str, advice: str) -> str | None:
    """Run all passes, each always in the same thread, to their next place; return that place, None at the end.

    Raises:
        LewisError: if they come to different places, since the model does not run `what` in one order; with `advice`.
    """
    workers.in_place([each.go_on for each in passes])
    places = {each.place for each in passes}
    if len(places) > 1:
        raise LewisError(
            f"the passes came to {sorted(map(str, places))[:3]} at once: this model does not run its {what} in one "
            f"order for every text; {advice}"
        )
    return places.pop()


class Pair(NamedTuple):
    """The two passes of a batch: through the expert that it is for, and through the merged model."""

    own: Pass
    merged: Pass


@dataclass(frozen=True)
class Shared:
    """What the parts of one fit in forward order share.

    Attributes:
        merge: the merge that is fitted.
        pairs: the passes of each expert's batches.
        experts: weights of the experts' models.
        merged: weights of the merged model, which reads the fitted tensors.
        fitted: takes the fitted tensors.
        workers: run the passes and the regressions.
        spill: keeps large tensors in memory or in files.
    """

    merge: Prepared
    pairs: Sequence[Sequence[Pair]]
    experts: Sequence[Weights]
    merged: Weights
    fitted: Fitted
    workers: Workers
    spill: Spill


def stop(path: str, with_inputs: bool, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook of the module `path`: pause the running pass, with the module's input if `with_inputs`.

    Raises:
        TypeError: if the module gets no tensor, since the model needs more than text.
    """
    if with_inputs and not isinstance(inputs[0], torch.Tensor):
        raise TypeError(f"{path} gets no tensor")
    wait((path, inputs[0] if with_inputs else None, None))


def stop_with_call(path: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A forward pre-hook, as `stop`, that hands the module's call to `Pass.call`; in that call it does not stop."""
    if Pass.current() is not None:
        wait((path, None, partial(module, *args, **named)))


def answering(module: nn.Module) -> Callable[[], None]:
    """Make a module return what `Pass.run_ahead` computed for the running pass. Returns a function that ends this."""
    forward = module.forward

    def answer(inputs: torch.Tensor) -> Any:
        run = Pass.current()
        if run is None or run.output is None:
            return forward(inputs)
        output, run.output = run.output, None
        return output

    module.forward = answer
    return partial(delattr, module, "forward")


def note_stream(path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook of the module `path`: note its input as a residual stream of the pass that is running."""
    run = Pass.current()
    if run is not None:
        run.streams[path] = run.batch.rows_of(inputs[0], path)
