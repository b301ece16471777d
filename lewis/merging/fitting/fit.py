"""Merge by regression: every projection is fitted to what the experts do on their calibration rows, block by block.

The calibration rows of expert t go through two models in step: through expert t itself, and through the model merged
so far. Where all passes have come to a projection, its weight is fitted (`lewis.methods.arithmetic.regression`): given
the inputs that the merged model has there, it has to give what the expert gives for its own inputs. Then all passes go
on with their own weights. So each layer makes up for the errors of those before it.

The stacked experts of a mixture are fitted where their module is reached (`lewis.merging.fitting.stacked_fit`), and a
head that experts have moved before the blocks (`lewis.merging.fitting.head`).

Every other tensor (norms, biases, embeddings that are not the head, experts of a mixture that are modules of their own)
is merged by the recipe's anchor, else by the method's own function. The fit is pulled towards what these give.

This module prepares the models and the passes; `lewis.merging.fitting.walk` leads them through the blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lewis import store
from lewis.devices import one_thread
from lewis.importance.calibration import Calibration
from lewis.importance.residuals import writers
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.merging.calibration_rows import warn_of_few_tokens
from lewis.merging.fitting.fitted import Fitted, Unwritten
from lewis.merging.fitting.head import fit_head
from lewis.merging.fitting.passes import Pair, Pass, Shared, answering, note_stream, stop, stop_with_call
from lewis.merging.fitting.solver import Solver
from lewis.merging.fitting.spill import IN_MEMORY, Spill
from lewis.merging.fitting.stacked_fit import StackedFit, stacks_of, tensors_in
from lewis.merging.fitting.walk import Walk
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.regression import sampled
from lewis.methods.arithmetic.tokens import within
from lewis.models.dtypes import size_of
from lewis.models.network.module_tree import Covered, Network
from lewis.models.network.network_class import input_embeddings
from lewis.progress import Report, silent

if TYPE_CHECKING:
    from lewis.importance.batches import Batch
    from lewis.importance.streaming import Weights

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 1024  # small, since many passes divide better among threads, and each stays in the cache


def fit(merge: Prepared, folder: Path, progress: Report = silent, threads: int | None = None) -> Fitted:
    """Fit all tensors of a merge that can be fitted, block by block.

    A model's code may use a weight without calling its module (Mamba's `dt_proj`). Such projections show in the first
    block that has one; then the fit begins again without them, and they are merged like all other tensors.

    Args:
        merge: a merge whose method fits.
        folder: where the tensors are kept, and what the passes hold between two projections if that is large
            (`lewis.merging.fitting.spill`); tensors that a killed process has finished there are not fitted again.
        progress: called with (fit, blocks done, blocks in all).
        threads: by default one per core; any number gives the same bytes.

    Raises:
        InputError: if transformers cannot build the model, a row is longer than it takes, nothing can be fitted, or
            there is no space.
        LewisError: if activations or weights are not finite, naming the projection, or the model's code uses a weight
            outside of its block.
    """
    from lewis.importance.streaming import NotLoaded

    aside = set[str]()
    while True:
        try:
            return _fit(merge, folder, progress, threads, aside)
        except NotLoaded as error:
            if _kind(error.parameter) in aside:  # used outside of its block
                raise
            logger.info("%s; projections like it are not fitted", error)
            aside.add(_kind(error.parameter))


def _kind(parameter: str) -> str:
    """What a parameter is, in whatever block: its name without numbers."""
    return ".".join(part for part in parameter.split(".") if not part.isdigit())


def _fit(merge: Prepared, folder: Path, progress: Report, threads: int | None, aside: Collection[str]) -> Fitted:
    """`fit`, without the projections whose `_kind` is in `aside`."""
    from lewis.importance.batches import batches
    from lewis.importance.measure import network_of
    from lewis.importance.streaming import Weights

    network = network_of(merge.base)
    check_rows(merge, network)
    covered = [e for e in in_order(network) if merge.merges(e.tensor) and _kind(e.parameter) not in aside]
    places = {each.parameter.rpartition(".")[0]: each for each in covered}
    # One whose module calls fitted projections, too (Zamba's mixer), cannot run on its own, as its fit asks for.
    stacks = {
        path: names
        for path, names in stacks_of(network, merge).items()
        if not any(place.startswith(f"{path}.") for place in places)
    }
    if not places and not stacks:
        raise merge.nothing_to_fit()
    names = [*(each.tensor for each in places.values()), *tensors_in(stacks)]
    share = sum(merge.base.tensors[name].elements for name in names) / merge.elements
    logger.info(
        "fitting %d tensors, %.0f %% of the weights; the others are merged as they are", len(names), 100 * share
    )
    _warn_of_few_tokens(merge, places.values())
    made = batches(_sets(merge), network, equal=bool(stacks), tokens=TOKENS_PER_PASS)
    fitted = Fitted(folder, merge.layout)
    spill = _spill(merge, network, sum(batch.ids.numel() for batch in made), folder)
    experts = [Weights(network_of(e.model), e.model, "cpu", torch.float32, spill.keep) for e in merge.experts]
    merged = Weights(network, Unwritten(merge, fitted, spill.empty), "cpu", torch.float32, spill.keep)
    pairs = _pairs(made, experts, merged, spill)
    streams = writers(network_of(merge.base), places)
    with ExitStack() as contexts:
        contexts.enter_context(one_thread())
        workers = contexts.enter_context(Workers(threads))
        begun = partial(progress, "fit", 0, len(network.blocks))  # while the head is fitted
        fit_head(merge, network, fitted, workers, TOKENS_PER_PASS, lambda *_: begun())
        shared = Shared(merge, pairs, experts, merged, fitted, workers, spill)
        stacked = StackedFit(shared, stacks)
        solver = Solver(shared, places, streams)
        walk = Walk(shared, places, solver, stacked)
        contexts.callback(walk.stop)
        for each in (*experts, merged):
            each.load_outside()
            for path in (*each.network.blocks, *places):
                module = each.network.module.get_submodule(path)
                contexts.callback(module.register_forward_pre_hook(partial(stop, path, path in places)).remove)
            for path in stacks:
                module = each.network.module.get_submodule(path)
                hook = module.register_forward_pre_hook(partial(stop_with_call, path), with_kwargs=True)
                contexts.callback(hook.remove)
            for path in streams if each is not merged else ():
                contexts.callback(answering(each.network.module.get_submodule(path)))
            for path in set(streams.values()):  # before the hooks that stop: the block's own input is noted, too
                module = each.network.module.get_submodule(path)
                contexts.callback(module.register_forward_pre_hook(partial(note_stream, path), prepend=True).remove)
        for done in walk.blocks():
            progress("fit", done, len(network.blocks))
        stacked.warn()
        solver.report()
    return fitted


def _sets(merge: Prepared) -> list[Calibration]:
    return [expert.calibration for expert in merge.experts if expert.calibration]


def _pairs(made: Sequence[Batch], experts: Sequence[Weights], merged: Weights, spill: Spill) -> list[list[Pair]]:
    """Make the two passes of each batch, through its expert and through the merged model, listed by expert."""
    from lewis.importance.streaming import forward

    pairs: list[list[Pair]] = [[] for _ in experts]
    count = [sum(batch.tokens for batch in made if batch.of == of) for of in range(len(experts))]
    begun = [0] * len(experts)  # tokens of the set in the batches before
    for batch in made:
        taken_of = partial(_taken, begun[batch.of], batch.tokens, count[batch.of], sum(count))
        own, there = (
            Pass(batch, partial(forward, each.network, batch.ids, batch.lengths), spill=spill, taken_of=taken_of)
            for each in (experts[batch.of], merged)
        )
        pairs[batch.of].append(Pair(own, there))
        begun[batch.of] += batch.tokens
    return pairs


def _taken(begun: int, tokens: int, count: int, total: int, size: int) -> torch.Tensor | None:
    """Which tokens of a batch a layer with `size` inputs is fitted on (`regression.sampled`); None for all."""
    taken = sampled(size, count, total)
    return None if taken is None else within(taken, begun, tokens)


def paused_bytes(merge: Prepared, network: Network, tokens: int | None = None) -> int:
    """Approximate bytes held while all passes are paused between two projections; in files above `IN_MEMORY`.

    These are weights, and for each token of a pass two rows of inputs of the widest projection and six hidden states.

    Args:
        merge: a merge whose method fits.
        network: the network of its base.
        tokens: number of tokens of all batches, with padding; by default that of the calibration sets.
    """
    tokens = sum(each.tokens for each in _sets(merge)) if tokens is None else tokens
    shapes = [(network.empty(each.parameter).shape, each.transposed) for each in in_order(network)]
    widest = max((shape[0] if transposed else shape[1] for shape, transposed in shapes), default=0)
    largest = max((shape.numel() for shape, _ in shapes), default=0)
    by_row = network.read_by_row()  # few rows
    outside = sum(network.empty(name).numel() for name in network.parameters_outside() if name not in by_row)
    hidden = input_embeddings(network.module).embedding_dim
    models = len(merge.experts) + 1
    weights = models * outside + (models + 3) * largest  # at a time; 3: a fit that is brought within its bound
    return 4 * (2 * tokens * (2 * widest + 6 * hidden) + weights)


def extra_disk_bytes(merge: Prepared, network: Network, held: int) -> int:
    """Approximate bytes on disk that a fit needs beyond the output: the fitted tensors, and what paused passes hold."""
    elements = sum(network.empty(each.parameter).numel() for each in in_order(network) if merge.merges(each.tensor))
    stacked = sum(size_of(*merge.layout[name]) for name in tensors_in(stacks_of(network, merge)))
    return 4 * elements + stacked + max((held if held > IN_MEMORY else 0) - merge.size, 0)


def _spill(merge: Prepared, network: Network, tokens: int, folder: Path) -> Spill:
    held = paused_bytes(merge, network, tokens)
    needed = merge.size + extra_disk_bytes(merge, network, held) - store.bytes_on_disk(folder)
    store.check_space(folder, needed, "the fit, with the inputs kept between two projections or with the output,")
    if held <= IN_MEMORY:
        return Spill()
    logger.info("paused passes hold up to %.2f GB, in files in %s", held / 1e9, folder)
    return Spill(folder)


def _warn_of_few_tokens(merge: Prepared, covered: Collection[Covered]) -> None:
    inputs = {each.tensor: merge.base.tensors[each.tensor].shape[0 if each.transposed else 1] for each in covered}
    for expert in merge.experts:
        tokens = expert.calibration.tokens if expert.calibration else 0
        warn_of_few_tokens(expert.ref, {name: (tokens, size) for name, size in inputs.items()})


def check_rows(merge: Prepared, network: Network) -> None:
    """Raise InputError if the model does not take a row of a calibration set: its length, or one of its tokens."""
    from lewis.importance.measure import check_samples

    for expert in merge.experts:
        for rows in filter(None, (expert.calibration, expert.held_back)):
            check_samples(merge.base, network, rows)


def in_order(network: Network) -> list[Covered]:
    """The covered tensors whose modules every forward pass calls in the same order, inside of a block.

    Without the experts of a mixture.
    """
    whole = network.unconverted
    return [
        each
        for each in network.covered
        if whole.get(each.tensor) == each.parameter
        and len(network.same(each.parameter)) == 1
        and ".experts." not in each.parameter
        and each.parameter.rpartition(".")[0] not in network.blocks
        and not each.stack
        and network.empty(each.parameter).dim() == 2
    ]
