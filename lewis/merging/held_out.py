"""The loss of a fitted merge on calibration rows that it was not fitted to; the merged model is not written for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from lewis.devices import one_thread
from lewis.errors import InputError, LewisError
from lewis.importance.calibration import Calibration
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.merging.fitted import Fitted
from lewis.merging.passes import Pass, stop
from lewis.merging.prepared import Prepared
from lewis.merging.unwritten import Unwritten
from lewis.models.network.network_class import input_embeddings

LOGITS = 1 << 24  # of a batch, at most: 64 MiB in fp32, unless one row alone has more


def check(merge: Prepared) -> None:
    """Raise InputError if the model does not predict the next token from those before it."""
    from lewis.importance.measure import network_of

    network = network_of(merge.base)
    if network.encodes or network.looks_ahead:
        raise InputError(
            f"{merge.base.folder}: parameters.ridge: auto goes by the loss of the next token, which this kind of "
            "model does not predict; give a number"
        )


def mean_loss(merge: Prepared, fitted: Fitted, sets: Sequence[Calibration], threads: int | None = None) -> float:
    """Nats per predicted token of the merged model: the mean over each set, then over the sets.

    At any time there are in memory: what lies outside of the blocks, one block, and the hidden states of all rows.

    Args:
        merge: that was fitted.
        fitted: its fitted tensors.
        sets: held-out rows of each expert.
        threads: by default one per core; any number gives the same bits.

    Raises:
        LewisError: if the model does not run its blocks in one order for every text.
    """
    from lewis.importance.batches import Batch, batches
    from lewis.importance.measure import network_of
    from lewis.importance.streaming import Weights

    network = network_of(merge.base)
    weights = Weights(network, Unwritten(merge, fitted), "cpu", torch.float32)
    sums: dict[Batch, list[float]] = {}

    def score(batch: Batch) -> None:
        logits = network.module(input_ids=batch.ids, use_cache=False).logits
        found = []
        for row, length in enumerate(batch.lengths):
            predicted, wanted = logits[row, : length - 1].float(), batch.ids[row, 1:length]
            found.append(float(torch.nn.functional.cross_entropy(predicted, wanted, reduction="sum")))
        sums[batch] = found

    at_most = max(1, LOGITS // input_embeddings(network.module).num_embeddings)
    made = batches(sets, network, tokens=at_most)
    passes = [Pass(batch, partial(score, batch)) for batch in made]
    with ExitStack() as contexts:
        contexts.enter_context(one_thread())
        workers = contexts.enter_context(Workers(threads))
        contexts.callback(lambda: workers.in_place([each.stop for each in passes]))
        weights.check()
        weights.load(network.parameters_outside(with_head=True))
        weights.move_buffers()
        for path, block in network.blocks.items():
            contexts.callback(block.register_forward_pre_hook(partial(stop, path, False)).remove)
        loaded: list[str] = []
        while True:
            workers.in_place([each.go_on for each in passes])
            weights.drop(loaded)
            places = {each.place for each in passes}
            if len(places) > 1:
                raise LewisError(f"the passes came to {sorted(map(str, places))[:3]} at once; give ridge a number")
            if (place := places.pop()) is None:
                break
            loaded = list(network.parameters_in(place))
            weights.load(loaded)
    means = []
    for of, calibration in enumerate(sets):
        predicted = sum(len(sample) - 1 for sample in calibration.samples)
        means.append(sum(sum(sums[batch]) for batch in made if batch.of == of) / predicted)
    return sum(means) / len(means)
