"""Merge by regression on what was measured of the experts: each projection is fitted for their own inputs.

The importance step leaves second-order statistics of every expert on its own calibration rows
(`lewis.importance.grams`). From these each projection is fitted to give what the experts give for their own inputs
(`lewis.methods.arithmetic.regression`), one tensor after another. No model is run.

What no token reached in any expert (an expert of a mixture that no router chose), and what is no projection, is merged
by the recipe's anchor, else by the method's own function. That is also what the fit is pulled towards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lewis.devices import default_device, one_thread
from lewis.importance.architecture import Network
from lewis.importance.gram_files import Grams
from lewis.importance.passes import of_expert
from lewis.importance.step import find_or_measure_grams
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.merge.fitted import Fitted
from lewis.merge.prepared import Prepared
from lewis.merge.static_solver import Group, Part, bytes_of, solve_group
from lewis.methods.arithmetic.regression import one_after_another

logger = logging.getLogger(__name__)


_ROOM = 1 << 29  # bytes of memory in which layers are fitted side by side


def fit(
    merge: Prepared,
    folder: Path,
    progress: Callable[[float], None] | None = None,
    threads: int | None = None,
) -> Fitted:
    """Fit all tensors of a merge that can be fitted, block by block.

    Args:
        merge: whose method fits.
        folder: where the tensors are kept; the blocks that a killed process has finished there are not fitted again.
        progress: called with the share that is done, in [0, 1].
        threads: by default one per core; any number gives the same bytes.

    Raises:
        InputError: if transformers cannot build the model, or nothing can be fitted.
        LewisError: if statistics are damaged, or what is fitted is not finite, naming the tensor.
    """
    from lewis.importance.measure import network_of

    network = network_of(merge.base)
    blocks = _parts(network, merge)
    if not blocks:
        raise merge.nothing_to_fit()
    statistics = [
        Grams(find_or_measure_grams(expert.model, expert.calibration, device=default_device(), threads=threads))
        for expert in merge.experts
        if expert.calibration is not None
    ]
    _tell_of_few_tokens(merge, statistics, [part for tensors in blocks.values() for _, p in tensors for part in p])
    fitted = Fitted(folder)
    groups = {
        block: _by_input([each for each in tensors if each[0].tensor not in fitted], statistics)
        for block, tensors in blocks.items()
    }
    with ExitStack() as contexts:
        contexts.enter_context(one_thread())
        workers = contexts.enter_context(Workers(threads))
        largest = max((bytes_of(merge, group) for each in groups.values() for group in each), default=0)
        lanes = workers.count if workers.count * largest <= _ROOM else 1
        # Small layers are fitted side by side, each by one thread; of large ones all threads share one.
        solve = partial(solve_group, merge, statistics, jobs=workers if lanes == 1 else one_after_another)
        if lanes == 1:  # keep each as soon as it is there
            groups = {group[0][0].tensor: [group] for each in groups.values() for group in each}
        for done, (name, found) in enumerate(_in_lanes(groups, solve, lanes, contexts), 1):
            if found:
                fitted.add(name, found)
            if progress:
                progress(done / len(groups))
    return fitted


def _in_lanes(
    groups: Mapping[str, Sequence[Group]],
    solve: Callable[[Group], dict[str, torch.Tensor]],
    lanes: int,
    contexts: ExitStack,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yields the fitted tensors of each list of groups with its name, while the next are being fitted."""
    pool = ThreadPoolExecutor(lanes)
    contexts.callback(lambda: pool.shutdown(cancel_futures=True))
    running = list[tuple[str, list[Future[dict[str, torch.Tensor]]]]]()
    for block, each in [*groups.items(), ("", ())]:
        running.append((block, [pool.submit(solve, group) for group in each]))
        if len(running) > 1:
            before, futures = running.pop(0)
            yield before, {name: tensor for future in futures for name, tensor in future.result().items()}


def _parts(network: Network, merge: Prepared) -> dict[str, Group]:
    """Path of a block -> its tensors that can be fitted, with their parts; not those that several blocks share."""
    found = dict[str, Group]()
    for each in network.covered:
        if each.stack or not merge.merges(each.tensor) or len(network.same(each.parameter)) > 1:
            continue
        stacked = len(network.empty(each.parameter).shape) == 3 and each.expert is None
        count = network.empty(each.parameter).shape[0]
        parts = (
            [Part(of_expert(each.parameter, i), i) for i in range(count)]
            if stacked
            else [Part(of_expert(each.parameter, each.expert))]
        )
        block = next(path for path in network.blocks if each.parameter.startswith(f"{path}."))
        found.setdefault(block, []).append((each, parts))
    return found


def _by_input(tensors: Group, statistics: Sequence[Grams]) -> list[Group]:
    """The tensors that share their inputs together; those that take longest come first."""
    found = dict[Any, Group]()
    for covered, parts in tensors:
        sources = tuple(each.source(parts[0].projection) for each in statistics)
        found.setdefault(sources, []).append((covered, parts))
    return sorted(
        found.values(), key=lambda group: -sum(layer.parameters for each, _ in group for layer in each.layers)
    )


def _tell_of_few_tokens(merge: Prepared, statistics: Sequence[Grams], parts: Sequence[Part]) -> None:
    for expert, grams in zip(merge.experts, statistics, strict=True):
        names = dict.fromkeys(part.projection for part in parts)
        unseen = [name for name in names if name not in grams]
        if unseen:
            logger.warning(
                "%s: no token of its calibration set reached %d of %d projections, such as %s: they are fitted to the "
                "other experts, or are the sum of the task vectors if those have seen none either; raise samples",
                *(expert.ref, len(unseen), len(names), unseen[0]),
            )
        few = {name: (grams.tokens(name), grams.size(name)) for name in names if name in grams}
        few = {name: (tokens, size) for name, (tokens, size) in few.items() if tokens < size}
        if few:
            name, (tokens, size) = min(few.items(), key=lambda each: each[1][0] / each[1][1])
            logger.warning(
                "%s: %d of %d projections saw fewer tokens of its calibration set than they have inputs, such as %s, "
                "%d tokens for %d inputs: the ridge keeps the fit stable, but it may not hold for other texts; raise "
                "samples or max_tokens, to 2 tokens per input",
                *(expert.ref, len(few), len(names), name, tokens, size),
            )
