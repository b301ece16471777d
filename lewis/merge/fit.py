"""Merge by regression: every projection is fitted to what the experts do on their calibration rows, block by block.

The calibration rows of expert t go through two models at once: through expert t itself, and through the model merged
so far. Where all passes have come to a projection, its weight is fitted (`lewis.methods.arithmetic.regression`): given
the inputs that the merged model has there, it shall give what the expert gives for its own inputs. Then all passes go
on with their own weights. So each layer makes up for the errors of those before it.

A method that fits `static`ally needs no passes through the merged model: each projection is fitted to give what the
expert gives for the expert's own inputs.

What is no such projection (embeddings, norms, biases, head, stacked experts of a mixture) is merged by the recipe's
anchor, else by the method's own function. That is also what the fit is pulled towards.

Here the models and the passes are made ready; `lewis.merge.walk` leads them through the blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lewis.devices import one_thread
from lewis.errors import InputError
from lewis.importance.architecture import Covered, Network
from lewis.importance.residuals import writers
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.merge.fitted import Fitted
from lewis.merge.passes import Pair, Pass, note_stream, stop
from lewis.merge.prepared import Prepared
from lewis.merge.solver import Solver
from lewis.merge.unwritten import Unwritten
from lewis.merge.walk import Walk
from lewis.models.model import Model

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 1024  # more passes share out better among threads, and stay in the cache


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
    from lewis.importance.batches import Batch, batches
    from lewis.importance.measure import network_of
    from lewis.importance.streaming import Weights, forward

    forward_order = merge.method.fits == "forward"
    models: list[Model] = [*(expert.model for expert in merge.experts), *([Unwritten(merge)] if forward_order else [])]
    weights = [Weights(network_of(model), model, "cpu", torch.float32) for model in models]
    network = weights[-1].network
    places = {each.parameter.rpartition(".")[0]: each for each in in_order(network) if merge.merges(each.tensor)}
    if not places:
        raise InputError(
            f"{merge.base.folder}: no projection that {merge.method.name} could fit; use another merge_method"
        )
    share = sum(merge.base.tensors[each.tensor].elements for each in places.values()) / merge.elements
    logger.info(
        "fitting %d projections, %.0f %% of the weights; the others are merged as they are", len(places), 100 * share
    )
    _warn_of_few_tokens(merge, places.values())

    def through(each: Weights, batch: Batch) -> Pass:
        return Pass(batch, partial(forward, each.network, batch.ids, batch.lengths))

    sets = [expert.calibration for expert in merge.experts if expert.calibration]
    pairs: list[list[Pair]] = [[] for _ in merge.experts]
    for batch in batches(sets, network, tokens=TOKENS_PER_PASS):
        own = through(weights[batch.of], batch)
        pairs[batch.of].append(Pair(own, through(weights[-1], batch) if forward_order else own))
    experts, merged = weights[: len(merge.experts)], weights[-1] if forward_order else None
    streams = writers(network_of(models[-1]), places) if forward_order else {}
    fitted = Fitted(folder)
    with ExitStack() as contexts:
        contexts.enter_context(one_thread())
        workers = contexts.enter_context(Workers(threads))
        solver = Solver(merge, pairs, experts, merged, streams, workers)
        walk = Walk(merge, places, weights, [pair for each in pairs for pair in each], solver, workers, fitted)
        contexts.callback(walk.stop)
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
        for done in walk.blocks():
            if progress:
                progress(done)
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
