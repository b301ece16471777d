"""Merge by regression on statistics: each projection is fitted for the inputs that it gets in the expert models.

The importance step leaves second-order statistics of every expert on its own calibration rows
(`lewis.importance.grams`). From these each projection is fitted to give what the experts give for their own inputs
(`lewis.methods.arithmetic.regression`), one tensor after another. No model is run.

A projection that no token reached in any expert model (one of a mixture's experts that no router chose), and a tensor
that is no projection, are merged by the recipe's anchor, else by the method's own function. The fit is pulled towards
what these give.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lewis.devices import one_thread
from lewis.importance.calibration import Calibration
from lewis.importance.gram_files import Grams
from lewis.importance.step import find_or_measure_grams
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.merging.calibration_rows import warn_of_few_tokens
from lewis.merging.fitting.fitted import Fitted
from lewis.merging.fitting.static_solver import Group, NoRows, Statistics, bytes_of, parts_of, solve_group
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.sums import one_after_another
from lewis.models.network.module_tree import Network
from lewis.progress import Report, silent

logger = logging.getLogger(__name__)
_ROOM = 1 << 29  # bytes of memory in which layers are fitted side by side


def fit(
    merge: Prepared,
    folder: Path,
    progress: Report = silent,
    threads: int | None = None,
    unchanged: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit all tensors of a merge that can be fitted, block by block.

    Args:
        merge: a merge whose method fits.
        folder: where the tensors are kept; the blocks that a killed process has finished there are not fitted again.
        progress: called with (fit, tensors done, tensors in all).
        threads: by default one per core; any number gives the same bytes.
        unchanged: called before measured statistics are kept; raises LewisError if a model has changed meanwhile.

    Raises:
        InputError: if transformers cannot build the model, or nothing can be fitted.
        LewisError: if statistics are damaged, or what is fitted is not finite, naming the tensor.
    """
    from lewis.importance.measure import network_of

    network = network_of(merge.base)
    blocks = _parts(network, merge)
    if not blocks:
        raise merge.nothing_to_fit()
    sets = [expert.calibration for expert in merge.experts if expert.calibration is not None]
    statistics: list[Statistics] = []
    if any(each.samples for each in sets):
        statistics += _measured(merge, sets, blocks, threads, unchanged)
    else:
        logger.info("there are no calibration rows: the fit goes by the directions in which the experts' weights moved")
        statistics += [NoRows(_inputs(network, blocks))] * len(merge.experts)
    fitted = Fitted(folder, merge.layout)
    groups = {
        block: _by_input([each for each in tensors if each[0].tensor not in fitted], statistics)
        for block, tensors in blocks.items()
    }
    with ExitStack() as contexts:
        contexts.enter_context(one_thread())
        workers = contexts.enter_context(Workers(threads))
        largest = max((bytes_of(merge, group) for each in groups.values() for group in each), default=0)
        alone = workers.count * largest > _ROOM
        # Small layers are fitted side by side, each by one thread; of large ones all threads share one.
        solve = partial(solve_group, merge, statistics, jobs=workers if alone else one_after_another)
        found = _one_by_one(groups, solve) if alone else _in_lanes(groups, solve, workers.count, contexts)
        total, done = sum(len(group) for each in groups.values() for group in each), 0
        for name, tensors in found:
            if tensors:
                fitted.add(name, tensors)
            done += len(tensors)
            del tensors  # before the next is fitted
            progress("fit", done, max(total, 1))
    return fitted


def _measured(
    merge: Prepared,
    sets: Sequence[Calibration],
    blocks: Mapping[str, Group],
    threads: int | None,
    unchanged: Callable[[], None],
) -> list[Grams]:
    """Find or measure the statistics of each expert, and warn of projections that few tokens reached."""
    find = partial(find_or_measure_grams, device=merge.pass_device, threads=threads, unchanged=unchanged)
    statistics = [
        Grams(find(expert.model, calibration)) for expert, calibration in zip(merge.experts, sets, strict=True)
    ]
    names = dict.fromkeys(part.projection for each in blocks.values() for _, parts in each for part in parts)
    for expert, grams in zip(merge.experts, statistics, strict=True):
        warn_of_few_tokens(expert.ref, {n: (grams.tokens(n), grams.size(n) if n in grams else 0) for n in names})
    return statistics


def _inputs(network: Network, blocks: Mapping[str, Group]) -> dict[str, int]:
    """Name of a projection -> its number of inputs."""
    return {
        part.projection: network.empty(covered.parameter).shape[-2 if covered.transposed else -1]
        for tensors in blocks.values()
        for covered, parts in tensors
        for part in parts
    }


_Solve = Callable[[Group], "Iterator[tuple[str, torch.Tensor]]"]


def _one_by_one(groups: Mapping[str, Sequence[Group]], solve: _Solve) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each fitted tensor by itself, before the next is fitted: so no two of them are in memory."""
    for group in itertools.chain.from_iterable(groups.values()):
        for name, tensor in solve(group):
            yield name, {name: tensor}
            del tensor


def _in_lanes(
    groups: Mapping[str, Sequence[Group]], solve: _Solve, lanes: int, contexts: ExitStack
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the name of each block with all its fitted tensors, while those of the next block are being fitted."""
    pool = ThreadPoolExecutor(lanes)
    contexts.callback(lambda: pool.shutdown(cancel_futures=True))
    running = list[tuple[str, list[Future[dict[str, torch.Tensor]]]]]()
    for block, each in [*groups.items(), ("", ())]:
        running.append((block, [pool.submit(lambda group: dict(solve(group)), group) for group in each]))
        if len(running) > 1:
            before, futures = running.pop(0)
            yield before, {name: tensor for future in futures for name, tensor in future.result().items()}


def _parts(network: Network, merge: Prepared) -> dict[str, Group]:
    """Path of a block -> its tensors that can be fitted, with their parts; without tensors that blocks share."""
    found = dict[str, Group]()
    for each in network.covered:
        if each.stack or not merge.merges(each.tensor) or len(network.same(each.parameter)) > 1:
            continue
        block = next(path for path in network.blocks if each.parameter.startswith(f"{path}."))
        found.setdefault(block, []).append((each, parts_of(network, each)))
    return found


def _by_input(tensors: Group, statistics: Sequence[Statistics]) -> list[Group]:
    """Group the tensors that share their inputs; the groups with most parameters, which take longest, come first."""
    found = dict[Any, Group]()
    for covered, parts in tensors:
        sources = tuple(each.source(parts[0].projection) for each in statistics)
        found.setdefault(sources, []).append((covered, parts))
    return sorted(
        found.values(), key=lambda group: -sum(layer.parameters for each, _ in group for layer in each.layers)
    )
