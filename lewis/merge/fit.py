"""Merge by regression: every projection is fitted to what the experts do on their calibration rows, block by block.

The calibration rows of expert t go through two models at once: through expert t itself, and through the model merged
so far. Where all passes have come to a projection, its weight is fitted (`lewis.methods.arithmetic.regression`): given
the inputs that the merged model has there, it shall give what the expert gives for its own inputs. Then all passes go
on with their own weights. So each layer makes up for the errors of those before it.

Each pass is a greenlet that stops in front of every projection, in the code of whatever model it is. At any time there
are in memory: what lies outside of the blocks, the small tensors of one block, one projection of each model, and what
the passes hold between two projections.

A method that fits `static`ally needs no passes through the merged model: each projection is fitted to give what the
expert gives for the expert's own inputs.

What is no such projection (embeddings, norms, biases, head, stacked experts of a mixture) is merged by the method's own
function. That is also what the fit is pulled towards: its anchor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis.devices import one_thread
from lewis.errors import InputError, LewisError
from lewis.importance.architecture import Covered, Network
from lewis.importance.residuals import writers
from lewis.lazy_torch import torch
from lewis.merge.fitted import Fitted
from lewis.merge.in_torch import merge_whole
from lewis.merge.passes import Pass, note_stream, stop
from lewis.merge.prepared import Prepared
from lewis.merge.workers import Workers
from lewis.methods.arithmetic.regression import Inputs, Rows
from lewis.models.dtypes import torch_dtype
from lewis.models.model import Model

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lewis.importance.streaming import Weights


TOKENS_PER_PASS = 1024  # more passes share out better among threads, and stay in the cache


class _Merged:
    """The merged model as far as it is not fitted: reads like a checkpoint."""

    def __init__(self, merge: Prepared) -> None:
        base = merge.base
        self.read = partial(merge_whole, merge)
        self.folder, self.home, self.key, self.config = base.folder, base.home, base.key, base.config
        self.tensors, self.tied, self.shapes, self.raw = base.tensors, base.tied, base.shapes, base.raw
        self.will_need, self.done_with = base.will_need, base.done_with


def fit(
    merge: Prepared,
    folder: Path,
    progress: Callable[[float], None] | None = None,
    threads: int | None = None,
) -> Fitted:
    """Fit all tensors of a merge that can be fitted, block by block.

    Args:
        merge: whose method fits.
        folder: where the tensors are kept; what a killed process has finished there is not fitted again.
        progress: called with the share that is done, in [0, 1].
        threads: by default one per core; any number gives the same bytes.

    Raises:
        InputError: if transformers cannot build the model, or nothing can be fitted.
        LewisError: if activations or weights are not finite, naming the projection.
    """
    from lewis.importance.batches import batches
    from lewis.importance.measure import network_of
    from lewis.importance.streaming import Weights, forward

    experts = [expert.model for expert in merge.experts]
    models: list[Model] = [*experts, _Merged(merge)] if merge.method.fits == "forward" else experts
    networks = [network_of(model) for model in models]
    places = {each.parameter.rpartition(".")[0]: each for each in in_order(networks[-1]) if merge.merges(each.tensor)}
    if not places:
        raise InputError(
            f"{merge.base.folder}: no projection that {merge.method.name} could fit; use another merge_method"
        )
    share = sum(merge.base.tensors[each.tensor].elements for each in places.values()) / merge.elements
    logger.info(
        "fitting %d projections, %.0f %% of the weights; the others are merged as they are", len(places), 100 * share
    )
    _warn_of_few_tokens(merge, places.values())
    sets = [expert.calibration for expert in merge.experts if expert.calibration]
    made = batches(sets, networks[-1], tokens=TOKENS_PER_PASS)
    passes = [
        Pass(model, batch, partial(forward, networks[model], batch.ids, batch.lengths))
        for batch in made
        for model in ((batch.of, len(experts)) if len(models) > len(experts) else (batch.of,))
    ]
    fitted = Fitted(folder)
    with ExitStack() as contexts:
        contexts.enter_context(one_thread())
        workers = contexts.enter_context(Workers(threads))
        contexts.callback(lambda: workers.in_place([each.stop for each in passes]))
        weights = [Weights(n, model, "cpu", torch.float32) for n, model in zip(networks, models, strict=True)]
        streams = writers(network_of(models[-1]), places) if len(models) > len(experts) else {}
        for each in weights:
            each.check()
            each.load(each.network.parameters_outside())
            each.move_buffers()
            for path in (*each.network.blocks, *places):
                module = each.network.module.get_submodule(path)
                contexts.callback(module.register_forward_pre_hook(partial(stop, path, path in places)).remove)
            for path in set(streams.values()):  # before the hooks that stop: the block's own input is noted, too
                module = each.network.module.get_submodule(path)
                contexts.callback(module.register_forward_pre_hook(partial(note_stream, path), prepend=True).remove)
        for share in _Walk(merge, places, streams, weights, passes, workers, fitted).blocks():
            if progress:
                progress(share)
    return fitted


def _warn_of_few_tokens(merge: Prepared, covered: Collection[Covered]) -> None:
    shapes = [(merge.base.tensors[each.tensor].shape, each.transposed) for each in covered]
    largest = max(shape[0] if transposed else shape[1] for shape, transposed in shapes)
    for expert in merge.experts:
        tokens = expert.calibration.tokens if expert.calibration else 0
        if tokens < largest:
            logger.warning(
                "%s: its calibration set has %d tokens for projections with up to %d inputs: the ridge keeps the fit "
                "stable, but it may not hold for other texts; raise samples or max_tokens, to 2 tokens per input",
                expert.ref,
                tokens,
                largest,
            )


def in_order(network: Network) -> list[Covered]:
    """The covered tensors of modules that every pass comes to, in one order; not those of experts of a mixture."""
    found = []
    for each in network.covered:
        path, _, name = each.parameter.rpartition(".")
        alone = len(network.same(each.parameter)) == 1 and ".experts." not in each.parameter
        if each.expert is None and alone and getattr(network.module.get_submodule(path), name).dim() == 2:
            found.append(each)
    return found


class _Walk:
    """All passes on their way from place to place."""

    def __init__(
        self,
        merge: Prepared,
        places: Mapping[str, Covered],
        streams: Mapping[str, str],
        weights: Sequence[Weights],
        passes: list[Pass],
        workers: Workers,
        fitted: Fitted,
    ) -> None:
        """
        Args:
            merge: what is fitted.
            places: path of a module -> its tensor.
            streams: path of a module that writes into the residual stream -> of one whose input is the stream before.
            weights: of the experts, then of the merged model if passes go through it.
            passes: through all of them.
            workers: run the passes and the regressions.
            fitted: takes the tensors.
        """
        self._merge, self._places, self._weights, self._passes = merge, places, weights, passes
        self._streams = streams
        self._workers, self._fitted = workers, fitted
        self._loaded: list[tuple[Weights, list[str]]] = []
        self._in_block: list[str] = []
        self._found: dict[str, torch.Tensor] = {}
        self._inputs: tuple[Any, Inputs] | None = None

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
        self._workers.in_place([each.go_on for each in self._passes])
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
        of_places = {each.parameter for each in self._places.values()}
        self._in_block = [name for name in self._weights[-1].network.parameters_in(block) if name not in of_places]
        for weights in self._weights:
            weights.load(self._in_block)
        for each in self._passes:  # what was noted in the blocks before is not needed any more
            each.streams = {path: stream for path, stream in each.streams.items() if path == block}

    def _drop_block(self) -> None:
        self._drop()
        for weights in self._weights:
            weights.drop(self._in_block)
        self._in_block = []

    def _keep(self, block: str) -> None:
        self._drop_block()
        self._inputs = None
        if self._found:
            self._fitted.add(block, self._found)
            self._found = {}

    def _fit(self, place: str) -> None:
        self._drop()
        covered = self._places[place]
        known = covered.tensor in self._fitted
        readers: list[Callable[[str], torch.Tensor]] = [expert.model.read for expert in self._merge.experts]
        readers.append(self._fitted.read if known else partial(merge_whole, self._merge))
        *weights, value = self._read(covered.tensor, readers)
        if not known:
            value = self._found[covered.tensor] = self._solve(place, covered, weights, value)
        for each, weight in zip(self._weights, [*weights, value], strict=False):
            each.put(covered.parameter, weight)
            self._loaded.append((each, [covered.parameter]))

    def _read(self, tensor: str, readers: Sequence[Callable[[str], torch.Tensor]]) -> list[torch.Tensor]:
        found = [torch.empty(0)] * len(readers)

        def read(i: int) -> None:
            found[i] = readers[i](tensor).to(torch.float32)

        self._workers([partial(read, i) for i in range(len(readers))])
        return found

    def _solve(
        self, place: str, covered: Covered, weights: Sequence[torch.Tensor], anchor: torch.Tensor
    ) -> torch.Tensor:
        """Fit one tensor; fp32 in, the dtype of the output out."""
        name = covered.tensor
        values = self._merge.parameters(name)
        setting = (values["ridge"], tuple(values["weight"]))
        if self._inputs is None or self._inputs[0] != setting or any(each.is_new for each in self._passes):
            self._inputs = setting, Inputs(self._rows(setting[1]), setting[0], self._workers)
        if covered.transposed:
            anchor, weights = anchor.T.contiguous(), [weight.T.contiguous() for weight in weights]
        try:
            with torch.inference_mode():
                value = self._inputs[1].solve(anchor, weights, self._besides(place, values.get("residual", 0.0)))
        except ValueError as error:
            raise LewisError(f"{name}: {error}; a model is damaged") from error
        value = value.T if covered.transposed else value
        rounded = value.to(torch_dtype(self._merge.layout[name][0])).contiguous()
        if not bool(torch.isfinite(rounded).all()):
            raise LewisError(f"{name}: the regression gave values that are NaN or Inf; raise parameters.ridge")
        return rounded

    def _besides(self, place: str, residual: float) -> Sequence[list[torch.Tensor] | None]:
        """What the projection shall give besides: what the merged model's residual stream lacks, and its bias."""
        merged = len(self._merge.experts)
        stream = self._streams.get(place) if residual else None
        biases = [each.network.module.get_submodule(place).bias for each in self._weights]
        if len(biases) == merged or (stream is None and biases[merged] is None):
            return [None] * merged
        found = [[torch.empty(0)] * len(own) for own, _ in map(self._of_expert, range(merged))]

        def compare(expert: int, i: int, own: Pass, there: Pass) -> None:
            missing = residual * (own.streams[stream] - there.streams[stream]) if stream else torch.zeros(1)
            if biases[expert] is not None:
                missing = missing + (biases[expert] - biases[merged])
            found[expert][i] = missing.expand(own.batch.tokens, -1)

        self._workers(
            [
                partial(compare, expert, i, own, there)
                for expert in range(merged)
                for i, (own, there) in enumerate(zip(*self._of_expert(expert), strict=True))
            ]
        )
        return found

    def _of_expert(self, expert: int) -> tuple[list[Pass], list[Pass]]:
        """The passes with the rows of one expert, through itself and through the merged model."""
        merged = len(self._merge.experts)
        own = [each for each in self._passes if each.model == expert]
        return own, [each for each in self._passes if each.model == merged and each.batch.of == expert]

    def _rows(self, weights: Sequence[float]) -> list[Rows]:
        found = []
        for expert, weight in enumerate(weights):
            own, there = ([each.rows for each in passes if each.rows is not None] for passes in self._of_expert(expert))
            found.append(Rows(there or own, own, weight))
        return found
