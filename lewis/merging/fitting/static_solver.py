"""Fit tensors that share their inputs to statistics of the experts' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from lewis.devices import one_thread
from lewis.errors import LewisError
from lewis.importance.passes import of_expert
from lewis.lazy_torch import torch
from lewis.merging.fitting.fitted import Unwritten, rounded
from lewis.merging.fitting.solver import moved_rows
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.prior import prior_rows
from lewis.methods.arithmetic.regression import DUAL_ABOVE, DUAL_TOKENS, Inputs
from lewis.methods.arithmetic.sums import Jobs
from lewis.methods.arithmetic.tokens import Gram, Rows
from lewis.models.network.module_tree import Covered, Network


@dataclass(frozen=True)
class Part:
    """What one regression fits: a tensor, or one of the experts that are stacked in it.

    Attributes:
        projection: name of the projection in the statistics.
        index: index of the expert in the tensor; None if the part is the whole tensor.
    """

    projection: str
    index: int | None = None


Group = list[tuple[Covered, list[Part]]]
"""Tensors, each with its parts."""


class Statistics(Protocol):
    """Statistics of the inputs of projections; `gram_files.Grams` describes each method."""

    def __contains__(self, projection: str) -> bool: ...

    def source(self, projection: str) -> str | None: ...

    def inputs(self, projection: str, weight: float = 1.0) -> Gram | Rows: ...


class NoRows:
    """The statistics of an expert without calibration rows, with the interface of `gram_files.Grams`."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """
        Args:
            sizes: name of a projection -> its number of inputs.
        """
        self._sizes = sizes

    def __contains__(self, projection: str) -> bool:
        return True

    def source(self, projection: str) -> str | None:
        """Return the projection's own name, since nothing is known about inputs that several might share."""
        return projection

    def inputs(self, projection: str, weight: float = 1.0) -> Gram | Rows:
        """Return the inputs of a projection as `Rows` without any row."""
        none = [torch.empty(0, self._sizes[projection])]
        return Rows(none, none, weight)


def parts_of(network: Network, covered: Covered) -> list[Part]:
    """Return the parts of a tensor, each of which one regression fits."""
    if network.empty(covered.parameter).dim() != 3 or covered.expert is not None:
        return [Part(of_expert(covered.parameter, covered.expert))]
    return [Part(of_expert(covered.parameter, i), i) for i in range(network.empty(covered.parameter).shape[0])]


def bytes_of(merge: Prepared, group: Group) -> int:
    """Estimate the bytes of memory that fitting a group takes."""
    held, experts = 0, len(merge.experts)
    for covered, _ in group:
        info = merge.base.tensors[covered.tensor]
        inputs = info.shape[-2 if covered.transposed else -1]
        known = min(inputs, DUAL_TOKENS) if inputs > DUAL_ABOVE else inputs
        held = max(
            held, (2 * experts + 8) * known * inputs + (experts + 6) * merge.base.tensors[covered.tensor].elements
        )
    return 4 * held


def solve_group(
    merge: Prepared, statistics: Sequence[Statistics], group: Group, *, jobs: Jobs
) -> Iterator[tuple[str, torch.Tensor]]:
    """Fit tensors that share their inputs, one after another.

    Yields:
        The name and the fitted values of each tensor, in the dtype of the output; not of those that no token reached.

    Raises:
        LewisError: naming the tensor, if statistics are damaged, or inputs or the result are not finite.
    """
    solver = _Solver(merge, statistics, jobs)
    for covered, parts in group:
        known = [each for each in parts if any(each.projection in grams for grams in statistics)]
        if known:
            yield covered.tensor, solver.solve(covered, known)


class _Solver:
    """Fits one tensor after another; what is computed from inputs is kept for the next tensor that shares them."""

    def __init__(self, merge: Prepared, statistics: Sequence[Statistics], jobs: Jobs) -> None:
        self._merge, self._statistics, self._jobs = merge, statistics, jobs
        self._inputs: tuple[Any, Inputs] | None = None

    def solve(self, covered: Covered, parts: Sequence[Part]) -> torch.Tensor:
        """Fit these parts of a tensor; its other parts are those of the anchor."""
        with one_thread(), torch.inference_mode():
            return self._solve(covered, parts)

    def _solve(self, covered: Covered, parts: Sequence[Part]) -> torch.Tensor:
        name = covered.tensor
        readers: list[Callable[[str], torch.Tensor]] = [expert.model.read for expert in self._merge.experts]
        values = self._merge.parameters(name)
        readers += [self._merge.base.read] if values["prior"] else []
        anchor, *weights = self._jobs([partial(read, name) for read in (Unwritten(self._merge).read, *readers)])
        anchor = anchor.to(torch.float32)
        for part in parts:
            fitted, *own = (_part_of(tensor, part, covered) for tensor in (anchor, *weights))
            start, own = fitted.contiguous(), [each.contiguous() for each in own]
            try:
                inputs = self._of(part.projection, values)
                inputs.prior = self._prior(name, part, inputs, own, values["prior"])
                inputs.solve(start, own[: len(self._statistics)], out=start)
            except ValueError as error:
                raise LewisError(f"{name}: {error}; a model is damaged") from error
            if start.data_ptr() != fitted.data_ptr():
                fitted.copy_(start)
        del weights, own, start, fitted  # they take much memory
        return rounded(self._merge.layout, name, anchor)

    def _prior(
        self, name: str, part: Part, inputs: Inputs, weights: Sequence[torch.Tensor], strength: float
    ) -> list[Rows]:
        """Make the rows of a part's prior from the weights of the experts, then of the base; none at strength 0."""
        if not strength:
            return []
        *own, base = (each.float() for each in weights)
        moved = moved_rows(self._merge, name, own, base, part=part.index is not None)
        return prior_rows(inputs.experts, moved, strength)

    def _of(self, projection: str, values: Mapping[str, Any]) -> Inputs:
        sources = [grams.source(projection) for grams in self._statistics]
        setting = (sources, values["alpha"], values["weight"])
        if self._inputs is None or self._inputs[0] != setting:
            self._inputs = None  # free the last inputs before the next are read
            read = self._read_inputs(projection, values["weight"])
            self._inputs = setting, Inputs(read, values["ridge"], self._jobs, values["alpha"])
        self._inputs[1].ridge, self._inputs[1].bound = values["ridge"], values["bound"]
        return self._inputs[1]

    def _read_inputs(self, projection: str, weights: Sequence[float]) -> list[Rows | Gram]:
        def read(statistics: Statistics, weight: float) -> Rows | Gram | None:
            return statistics.inputs(projection, weight) if projection in statistics else None

        found = self._jobs([partial(read, *each) for each in zip(self._statistics, weights, strict=True)])
        size = next(each.size for each in found if each is not None)
        nothing = torch.empty(0, size)
        return [Rows([nothing], [nothing], w) if each is None else each for each, w in zip(found, weights, strict=True)]


def _part_of(tensor: torch.Tensor, part: Part, covered: Covered) -> torch.Tensor:
    """Return the view of a part of a tensor, of shape (out, in)."""
    own = tensor if part.index is None else tensor[part.index]
    return own.T if covered.transposed else own
