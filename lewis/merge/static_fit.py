"""Merge by regression on what was measured of the experts: each projection is fitted for their own inputs.

The importance step leaves second-order statistics of every expert on its own calibration rows
(`lewis.importance.grams`). From these each projection is fitted to give what the experts give for their own inputs
(`lewis.methods.arithmetic.regression`), one tensor after another. No model is run.

What no token reached in any expert (an expert of a mixture that no router chose), and what is no projection, is merged
by the recipe's anchor, else by the method's own function. That is also what the fit is pulled towards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lewis.devices import default_device, one_thread
from lewis.errors import InputError, LewisError
from lewis.importance.architecture import Covered, Network
from lewis.importance.gram_files import Grams
from lewis.importance.passes import of_expert
from lewis.importance.step import find_or_measure_grams
from lewis.importance.workers import Workers
from lewis.lazy_torch import torch
from lewis.merge.fitted import Fitted
from lewis.merge.in_torch import merge_whole
from lewis.merge.prepared import Prepared
from lewis.methods.arithmetic.regression import Inputs
from lewis.methods.arithmetic.tokens import Gram, Rows
from lewis.models.dtypes import torch_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """What is fitted at once: a tensor, or one of the experts that are stacked in it.

    Attributes:
        projection: its name in the statistics.
        index: of the expert in the tensor; None if it is the whole tensor.
    """

    projection: str
    index: int | None = None


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
        raise InputError(
            f"{merge.base.folder}: no projection that {merge.method.name} could fit; use another merge_method"
        )
    statistics = [
        Grams(find_or_measure_grams(expert.model, expert.calibration, device=default_device(), threads=threads))
        for expert in merge.experts
        if expert.calibration is not None
    ]
    _tell_of_few_tokens(merge, statistics, [part for tensors in blocks.values() for _, p in tensors for part in p])
    fitted = Fitted(folder)
    with one_thread(), Workers(threads) as workers:
        solver = _Solver(merge, statistics, workers)
        for done, (block, tensors) in enumerate(blocks.items(), 1):
            wanted = [each for each in tensors if each[0].tensor not in fitted]
            found = {covered.tensor: solver.solve(covered, parts) for covered, parts in _by_input(wanted, statistics)}
            if found:
                fitted.add(block, {name: tensor for name, tensor in found.items() if tensor is not None})
            if progress:
                progress(done / len(blocks))
    return fitted


_Tensors = list[tuple[Covered, list[_Part]]]


def _parts(network: Network, merge: Prepared) -> dict[str, _Tensors]:
    """Path of a block -> its tensors that can be fitted, with their parts; not those that several blocks share."""
    found = dict[str, _Tensors]()
    for each in network.covered:
        if not merge.merges(each.tensor) or len(network.same(each.parameter)) > 1:
            continue
        stacked = len(network.empty(each.parameter).shape) == 3 and each.expert is None
        count = network.empty(each.parameter).shape[0]
        parts = (
            [_Part(of_expert(each.parameter, i), i) for i in range(count)]
            if stacked
            else [_Part(of_expert(each.parameter, each.expert))]
        )
        block = next(path for path in network.blocks if each.parameter.startswith(f"{path}."))
        found.setdefault(block, []).append((each, parts))
    return found


def _by_input(tensors: _Tensors, statistics: Sequence[Grams]) -> _Tensors:
    """Those that share their inputs one after another."""
    order = dict[Any, _Tensors]()
    for covered, parts in tensors:
        sources = tuple(each.source(parts[0].projection) for each in statistics)
        order.setdefault(sources, []).append((covered, parts))
    return [each for group in order.values() for each in group]


class _Solver:
    """Fits tensor after tensor. What follows from inputs that several share is kept for them."""

    def __init__(self, merge: Prepared, statistics: Sequence[Grams], workers: Workers) -> None:
        self._merge, self._statistics, self._workers = merge, statistics, workers
        self._inputs: tuple[Any, Inputs] | None = None

    def solve(self, covered: Covered, parts: Sequence[_Part]) -> torch.Tensor | None:
        """Fit one tensor, in the dtype of the output; None if no token reached it."""
        name = covered.tensor
        known = [each for each in parts if any(each.projection in grams for grams in self._statistics)]
        if not known:
            return None
        readers: list[Callable[[str], torch.Tensor]] = [expert.model.read for expert in self._merge.experts]
        *weights, anchor = self._read(name, [*readers, partial(merge_whole, self._merge.anchor)])
        values, fitted = self._merge.parameters(name), anchor.clone()
        for part in known:
            start, *own = (_part_of(tensor, part, covered).contiguous() for tensor in (anchor, *weights))
            try:
                with torch.inference_mode():
                    value = self._of(part.projection, values).solve(start, own)
            except ValueError as error:
                raise LewisError(f"{name}: {error}; a model is damaged") from error
            _part_of(fitted, part, covered).copy_(value)
        rounded = fitted.to(torch_dtype(self._merge.layout[name][0])).contiguous()
        if not bool(torch.isfinite(rounded).all()):
            raise LewisError(f"{name}: the regression gave values that are NaN or Inf; raise parameters.ridge")
        return rounded

    def _read(self, tensor: str, readers: Sequence[Callable[[str], torch.Tensor]]) -> list[torch.Tensor]:
        found = [torch.empty(0)] * len(readers)

        def read(i: int) -> None:
            found[i] = readers[i](tensor).to(torch.float32)

        self._workers([partial(read, i) for i in range(len(readers))])
        return found

    def _of(self, projection: str, values: Mapping[str, Any]) -> Inputs:
        sources = [grams.source(projection) for grams in self._statistics]
        setting = (sources, values["alpha"], values["weight"])
        if self._inputs is None or self._inputs[0] != setting:
            self._inputs = None  # let go of it before the next is read
            read = self._read_inputs(projection, values["weight"])
            self._inputs = setting, Inputs(read, values["ridge"], self._workers, values["alpha"])
        self._inputs[1].ridge = values["ridge"]
        return self._inputs[1]

    def _read_inputs(self, projection: str, weights: Sequence[float]) -> list[Rows | Gram]:
        found: list[Rows | Gram | None] = [None] * len(self._statistics)

        def read(i: int) -> None:
            if projection in self._statistics[i]:
                found[i] = self._statistics[i].inputs(projection, weights[i])

        self._workers([partial(read, i) for i in range(len(found))])
        size = next(each.size for each in found if each is not None)
        nothing = torch.empty(0, size)
        return [Rows([nothing], [nothing], w) if each is None else each for each, w in zip(found, weights, strict=True)]


def _part_of(tensor: torch.Tensor, part: _Part, covered: Covered) -> torch.Tensor:
    """The view of a part as (out, in)."""
    own = tensor if part.index is None else tensor[part.index]
    return own.T if covered.transposed else own


def _tell_of_few_tokens(merge: Prepared, statistics: Sequence[Grams], parts: Sequence[_Part]) -> None:
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
