"""Merge by regression in forward order: every projection is fitted to what the experts do, from the first block on.

The calibration rows of expert t go through two models at once: through expert t itself, and through the model merged
so far. Where all passes have come to a projection, its weight is fitted (`lewis.methods.arithmetic.regression`): given
the inputs that the merged model has there, it shall give what the expert gives for its own inputs. Then all passes go
on with their own weights. So each layer makes up for the errors of those before it.

Each pass is a greenlet that stops in front of every projection, in the code of whatever model it is. At any time there
are in memory: what lies outside of the blocks, the small tensors of one block, one projection of each model, and what
the passes hold between two projections.

What is no such projection (embeddings, norms, biases, head, stacked experts of a mixture) is the anchor's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis import store
from lewis.devices import one_thread
from lewis.errors import InputError, LewisError
from lewis.importance.architecture import Covered, Network
from lewis.importance.calibration import Calibration
from lewis.lazy_torch import nn, torch
from lewis.merge.workers import Workers
from lewis.methods.arithmetic.regression import Inputs, Rows
from lewis.models.dtypes import torch_dtype
from lewis.models.model import Model

if TYPE_CHECKING:
    from greenlet import greenlet

    from lewis.importance.batches import Batch

logger = logging.getLogger(__name__)
SEMANTICS = "1"  # bump when the same inputs would give other bytes


@dataclass(frozen=True)
class Fit:
    """What decides the result, beside the models.

    Attributes:
        ridge: pull towards the anchor, in units of the mean diagonal of the inputs' products.
        weights: of each expert, c_t times its number of tokens.
    """

    ridge: float
    weights: tuple[float, ...]


class Solved:
    """The fitted tensors, on disk, a file for each block.

    A file that a killed process has finished is found again: its checksum stands in a list beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._index, self._places = folder / "blocks.json", dict[str, Path]()
        known = store.read_json(self._index) or {}
        for name, (sha256, tensors) in known.items() if isinstance(known, dict) else ():
            path = folder / name
            if path.is_file() and store.file_sha256(path) == sha256:
                self._places |= dict.fromkeys(tensors, path)
        self._known = {path.name: known[path.name] for path in dict.fromkeys(self._places.values())}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """A fitted tensor, in the dtype of the output."""
        from safetensors import safe_open

        with safe_open(self._places[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def add(self, block: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors of a block."""
        from safetensors.torch import save

        path = self.folder / f"{block}.safetensors"
        store.write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        self._known[path.name] = [store.file_sha256(path), list(tensors)]
        store.write_json(self._index, self._known)
        self._places |= dict.fromkeys(tensors, path)


class _Merged:
    """The merged model as far as it is known: reads like a checkpoint."""

    def __init__(self, base: Model, anchor: Callable[[str], torch.Tensor]) -> None:
        self._base, self.read = base, anchor
        self.folder, self.home, self.key, self.config = base.folder, base.home, base.key, base.config
        self.tensors, self.tied, self.shapes, self.raw = base.tensors, base.tied, base.shapes, base.raw

    def will_need(self, name: str) -> None:
        self._base.will_need(name)

    def done_with(self, name: str) -> None:
        self._base.done_with(name)


@dataclass(eq=False)
class _Pass:
    """One batch on its way through one model.

    Attributes:
        model: index of the model: the expert, or one more than there are experts for the merged model.
        place: path of the block or projection that it waits in front of; None at its end.
        rows: inputs of that projection without padding, fp32 (tokens, in).
    """

    model: int
    batch: Batch
    forward: Callable[[], None]
    run: greenlet | None = None
    place: str | None = None
    rows: torch.Tensor | None = None
    _raw: torch.Tensor | None = None
    is_new: bool = True

    def go_on(self) -> None:
        """Run to the next place; always in the same thread."""
        from greenlet import greenlet

        if self.run is None:
            self.run = greenlet(self.forward)
        found = self.run.switch()
        self.place, inputs = (None, None) if self.run.dead else found
        self.is_new = inputs is None or inputs is not self._raw
        if self.is_new:
            self._raw = inputs
            self.rows = None if inputs is None else self._without_padding(inputs)

    def stop(self) -> None:
        """End what waits here, in its own thread."""
        if self.run is not None and not self.run.dead:
            self.run.throw()
        self._raw = self.rows = None

    def _without_padding(self, inputs: torch.Tensor) -> torch.Tensor:
        width, flat = self.batch.ids.shape[1], inputs.reshape(-1, inputs.shape[-1]).float()
        if inputs.shape[:-1].numel() != self.batch.ids.numel():
            if min(self.batch.lengths) < width:
                raise LewisError(
                    f"{self.place}: sees {inputs.shape[:-1].numel()} of {self.batch.ids.numel()} tokens, and which are "
                    "padding is unknown; this way of routing is not supported"
                )
            return flat
        if min(self.batch.lengths) == width:
            return flat
        real = torch.arange(width)[None] < torch.tensor(self.batch.lengths)[:, None]
        return flat[real.reshape(-1).to(flat.device)]


def fitted(covered: Sequence[Covered], network: Network) -> list[Covered]:
    """The covered tensors that are fitted: those of modules that every pass comes to, in one order."""
    found = []
    for each in covered:
        module = network.module.get_submodule(each.parameter.rpartition(".")[0])
        alone = len(network.same(each.parameter)) == 1 and ".experts." not in each.parameter
        if each.expert is None and alone and getattr(module, each.parameter.rpartition(".")[2]).dim() == 2:
            found.append(each)
    return found


class ForwardOrder:
    """A merge in forward order that can be run."""

    def __init__(
        self,
        base: Model,
        experts: Sequence[Model],
        calibrations: Sequence[Calibration],
        fit: Fit,
        *,
        anchor: Callable[[str], torch.Tensor],
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        left_out: frozenset[str] = frozenset(),
    ) -> None:
        """
        Args:
            base: for its architecture.
            experts: opened; their tensors have the base's names and shapes.
            calibrations: the set of each expert.
            fit: ridge and weights.
            anchor: tensor name -> its value in the anchor, in the dtype of the output.
            layout: tensor name -> dtype and shape of the output.
            left_out: tensors that are the anchor's though they could be fitted.

        Raises:
            InputError: if transformers cannot build the model, or nothing can be fitted.
        """
        from lewis.importance.measure import network_of

        self._models: list[Model] = [*experts, _Merged(base, anchor)]
        self._experts, self._calibrations, self._fit, self._layout = list(experts), list(calibrations), fit, layout
        self._anchor = anchor
        self._networks = [network_of(model) for model in self._models]
        network = self._networks[-1]
        self.covered = [each for each in fitted(network.covered, network) if each.tensor not in left_out]
        if not self.covered:
            raise InputError(f"{base.folder}: no projection that a regression could fit; use another merge_method")
        self._of_place = {each.parameter.rpartition(".")[0]: each for each in self.covered}

    def run(self, folder: Path, progress: Callable[[float], None] | None = None, threads: int | None = None) -> Solved:
        """Fit all tensors, block by block.

        Args:
            folder: where they are kept; what a killed process has finished there is not fitted again.
            progress: called with the share that is done, in [0, 1].
            threads: by default one per core; any number gives the same bytes.

        Raises:
            LewisError: if activations or weights are not finite, naming the projection.
        """
        from lewis.importance.batches import batches
        from lewis.importance.streaming import Weights, forward

        solved = Solved(folder)
        merged = len(self._experts)
        weights = [
            Weights(network, model, "cpu", torch.float32)
            for network, model in zip(self._networks, self._models, strict=True)
        ]
        made = batches(self._calibrations, self._networks[-1], whole=False)
        passes = [
            _Pass(model, batch, partial(forward, self._networks[model], batch.ids, batch.lengths))
            for batch in made
            for model in (batch.of, merged)
        ]
        with ExitStack() as contexts:
            contexts.enter_context(one_thread())
            workers = contexts.enter_context(Workers(threads))
            contexts.callback(lambda: workers([each.stop for each in passes]))
            for each in weights:
                each.check()
                each.load(each.network.parameters_outside())
                each.move_buffers()
                self._stop_at_places(each.network, contexts)
            walk = _Walk(self, weights, passes, workers, solved)
            for share in walk.blocks():
                if progress:
                    progress(share)
        return solved

    def _stop_at_places(self, network: Network, contexts: ExitStack) -> None:
        for path, block in network.blocks.items():
            contexts.callback(block.register_forward_pre_hook(partial(_stop, path, False)).remove)
        for path in self._of_place:
            module = network.module.get_submodule(path)
            contexts.callback(module.register_forward_pre_hook(partial(_stop, path, True)).remove)


class _Walk:
    """All passes on their way from place to place."""

    def __init__(
        self, order: ForwardOrder, weights: Sequence[Any], passes: list[_Pass], workers: Workers, solved: Solved
    ) -> None:
        self._order, self._weights, self._passes, self._workers, self._solved = order, weights, passes, workers, solved
        self._loaded: list[tuple[Any, list[str]]] = []
        self._in_block: list[str] = []
        self._found: dict[str, torch.Tensor] = {}
        self._inputs: Inputs | None = None

    def blocks(self) -> Iterator[float]:
        """Go through the model; yields the share of the blocks that are done, after each."""
        network, block, done = self._weights[-1].network, "", 0
        while (place := self._next()) is not None:
            if place in network.blocks:
                if block:
                    done += 1
                    self._keep(block)
                    yield min(1.0, done / len(network.blocks))
                block = place
                self._enter(place)
            else:
                self._fit(place)
        if block:
            self._keep(block)
        yield 1.0

    def _next(self) -> str | None:
        self._workers([each.go_on for each in self._passes])
        places = {each.place for each in self._passes}
        if len(places) > 1:
            raise LewisError(
                f"the passes came to {sorted(map(str, places))[:3]} at once: this model does not run its projections "
                "in one order for every text; use another merge_method"
            )
        return places.pop()

    def _drop(self) -> None:
        for weights, names in self._loaded:
            weights.drop(names)
        self._loaded = []

    def _enter(self, block: str) -> None:
        self._drop_block()
        of_places = {each.parameter for each in self._order.covered}
        self._in_block = [name for name in self._weights[-1].network.parameters_in(block) if name not in of_places]
        for weights in self._weights:
            weights.load(self._in_block)

    def _drop_block(self) -> None:
        self._drop()
        for weights in self._weights:
            weights.drop(self._in_block)
        self._in_block = []

    def _keep(self, block: str) -> None:
        self._drop_block()
        self._inputs = None
        if self._found:
            self._solved.add(block, self._found)
            self._found = {}

    def _fit(self, place: str) -> None:
        self._drop()
        covered = self._order._of_place[place]
        known = covered.tensor in self._solved
        readers: list[Callable[[str], torch.Tensor]] = [model.read for model in self._order._experts]
        readers.append(self._solved.read if known else self._order._anchor)
        *weights, value = self._read(covered.tensor, readers)
        if not known:
            value = self._found[covered.tensor] = self._solve(covered, weights, value)
        for each, weight in zip(self._weights, [*weights, value], strict=True):
            each.put(covered.parameter, weight)
            self._loaded.append((each, [covered.parameter]))

    def _read(self, tensor: str, readers: Sequence[Callable[[str], torch.Tensor]]) -> list[torch.Tensor]:
        found = [torch.empty(0)] * len(readers)

        def read(i: int) -> None:
            found[i] = readers[i](tensor).to(torch.float32)

        self._workers([partial(read, i) for i in range(len(readers))])
        return found

    def _solve(self, covered: Covered, weights: Sequence[torch.Tensor], anchor: torch.Tensor) -> torch.Tensor:
        order = self._order
        if self._inputs is None or any(each.is_new for each in self._passes):
            self._inputs = Inputs(self._rows(), order._fit.ridge, self._workers)
        if covered.transposed:
            anchor, weights = anchor.T.contiguous(), [weight.T.contiguous() for weight in weights]
        try:
            with torch.inference_mode():
                value = self._inputs.solve(anchor, weights)
        except ValueError as error:
            raise LewisError(f"{covered.tensor}: {error}; a model is damaged") from error
        value = value.T if covered.transposed else value
        rounded = value.to(torch_dtype(order._layout[covered.tensor][0])).contiguous()
        if not bool(torch.isfinite(rounded).all()):
            raise LewisError(
                f"{covered.tensor}: the regression gave values that are NaN or Inf; raise parameters.ridge"
            )
        return rounded

    def _rows(self) -> list[Rows]:
        order, found = self._order, []
        for expert, weight in enumerate(order._fit.weights):
            own = [each.rows for each in self._passes if each.model == expert]
            merged = [
                each.rows for each in self._passes if each.model == len(order._experts) and each.batch.of == expert
            ]
            assert all(rows is not None for rows in (*own, *merged))
            found.append(Rows(merged, own, weight))  # type: ignore[arg-type]
        return found


def _stop(path: str, with_inputs: bool, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Let the others go on, until it is this pass's turn again."""
    from greenlet import getcurrent

    getcurrent().parent.switch((path, inputs[0] if with_inputs else None))
