"""The walk of all passes of a fit through the blocks: load weights, fit projections, write results, drop weights.

Each pass is a greenlet that stops in front of every projection, in the code of whatever model it is. At any time there
are in memory: what lies outside of the blocks, the small tensors of one block, one projection of each model, and what
the passes hold between two projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lewis.lazy_torch import torch
from lewis.merging.engine.in_torch import merge_into
from lewis.merging.fitting.fitted import rounded
from lewis.merging.fitting.passes import Shared, advance
from lewis.merging.fitting.solver import Solver
from lewis.merging.fitting.stacked_fit import StackedFit
from lewis.methods.arithmetic.sums import one_after_another
from lewis.models.network.module_tree import Covered

if TYPE_CHECKING:
    from lewis.importance.streaming import Weights

IN_MEMORY_FITTED = 64 << 20  # bytes of fitted tensors that wait to be written together


class Walk:
    """Leads all passes of a fit through the blocks of their models."""

    def __init__(self, shared: Shared, places: Mapping[str, Covered], solver: Solver, stacked: StackedFit) -> None:
        """
        Args:
            shared: the merge, its models and the passes.
            places: path of a module that is fitted -> its tensor.
            solver: fits the tensor of a place.
            stacked: fits stacked experts.
        """
        self._shared, self._places, self._solver, self._stacked = shared, places, solver, stacked
        self._weights = [*shared.experts, shared.merged]
        pairs = [pair for each in shared.pairs for pair in each]
        # First the experts' passes, which have less to do: so each thread gets as many of them as of the others.
        self._passes = [*(pair.own for pair in pairs), *(pair.merged for pair in pairs)]
        self._loaded: list[tuple[Weights, list[str]]] = []
        self._in_block: list[str] = []
        self._found: dict[str, torch.Tensor] = {}

    def blocks(self) -> Iterator[int]:
        """Lead all passes through the model; yield after each block how many are done."""
        network, entered = self._shared.merged.network, 0
        step = partial(advance, self._passes, self._shared.workers, "projections", "use another merge_method")
        while (place := step()) is not None:
            if place in network.blocks:
                self._leave()
                if entered:
                    yield min(entered, len(network.blocks))
                entered += 1
                self._enter(place)
            elif place in self._stacked:
                self._drop()
                self._solver.forget()
                self._stacked.fit(place)
            else:
                self._fit(place)
        self._leave()
        yield len(network.blocks)

    def stop(self) -> None:
        """End the passes that still wait."""
        self._shared.workers.in_place([each.stop for each in self._passes])

    def _drop(self) -> None:
        for weights, names in self._loaded:
            weights.drop(names)
        self._loaded = []

    def _enter(self, block: str) -> None:
        of_places = {each.parameter for each in self._places.values()}
        names = self._shared.merged.network.parameters_in(block)
        self._in_block = [name for name in names if name not in of_places]
        for weights in self._weights:
            weights.load(self._in_block)
            weights.drop(of_places.intersection(names))
        for each in self._passes:  # drop the inputs recorded in earlier blocks
            each.streams = {path: stream for path, stream in each.streams.items() if path == block}

    def _leave(self) -> None:
        """Drop the weights of the block that all passes have left, and write what was fitted there."""
        self._drop()
        for weights in self._weights:
            weights.drop(self._in_block)
        self._in_block = []
        self._solver.forget()
        self._write()

    def _write(self) -> None:
        if self._found:
            self._shared.fitted.add(next(iter(self._found)), self._found)
            self._found = {}

    def _fit(self, place: str) -> None:
        """Load the projection at `place` into each model; in the merged model its weight is fitted, if not yet done."""
        self._drop()
        covered = self._places[place]
        known = covered.tensor in self._shared.fitted
        readers: list[Callable[[str], torch.Tensor]] = [expert.model.read for expert in self._shared.merge.experts]
        readers.append(self._shared.fitted.read if known else self._anchor)
        *weights, value = self._read(covered.tensor, readers)
        for each, weight in zip(self._shared.experts, weights, strict=True):
            self._put(each, covered.parameter, weight)
        if not known:
            found = self._found[covered.tensor] = self._solver.solve(place, covered, weights, value)
            value = rounded(self._shared.merge.layout, covered.tensor, found)  # as it will be read
            if sum(each.nbytes for each in self._found.values()) > IN_MEMORY_FITTED:
                self._write()
        else:
            self._solver.forget()  # the next projection may share its inputs with this one, not with the last solved
        self._put(self._shared.merged, covered.parameter, value)
        self._shared.merged.model.done_with(covered.tensor)

    def _put(self, weights: Weights, parameter: str, value: torch.Tensor) -> None:
        weights.put(parameter, value)
        self._loaded.append((weights, [parameter]))

    def _read(self, tensor: str, readers: Sequence[Callable[[str], torch.Tensor]]) -> list[torch.Tensor]:
        def read(reader: Callable[[str], torch.Tensor]) -> torch.Tensor:
            return self._shared.spill.keep(reader(tensor), torch.float32)

        # The last reader comes first: it merges, which takes longest. If tensors are kept in files, one is read at a
        # time, because each is in memory as a whole while it is read.
        run = self._shared.workers if self._shared.spill.folder is None else one_after_another
        return run([partial(read, reader) for reader in reversed(readers)])[::-1]

    def _anchor(self, tensor: str) -> torch.Tensor:
        anchor = self._shared.merge.maker_of(tensor)
        return merge_into(anchor, tensor, self._shared.spill.empty(anchor.base.tensors[tensor].shape))
