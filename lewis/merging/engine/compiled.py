"""Merge tensors with the compiled loops of `kernels`, a chunk at a time, straight from the mapped files.

The output equals, byte for byte, that of the method's own function in torch. Where that cannot be promised (a
method without compiled loops, fp64, a number that is not finite) `merge_tensor` returns False, and the caller merges
the tensor in torch. Which loops a method needs is data in its decorator: `lewis.methods.loops`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis.merging.engine import kernels
from lewis.merging.engine.kernels import KINDS
from lewis.merging.engine.selection import Kept, Pair, Varied, address_of
from lewis.merging.memory_budget import chunks
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.sums import cancel_out, exact_sum, least_divisor
from lewis.methods.loops import Combine, Loops
from lewis.models.dtypes import DTYPES
from lewis.models.model import Model

if TYPE_CHECKING:
    import torch

Write = Callable[[memoryview, int], None]
"""Writes bytes of one tensor; called with the bytes and their offset in the tensor."""

Run = Callable[[int, int, np.uint64], bool]
"""Merges the elements from start to stop and writes them to an address; returns whether a number is not finite."""


def merge_tensor(merge: Prepared, name: str, write: Write) -> bool:
    """Merge one tensor chunk by chunk, and pass the bytes of each chunk to `write`.

    Returns:
        False if the tensor has to be merged by the method's function; then the bytes written so far are void.

    Raises:
        LewisError: as `write`.
    """
    info, (out, _) = merge.base.tensors[name], merge.layout[name]
    if info.elements == 0:
        return True
    if info.dtype not in KINDS or out not in KINDS or not merge.compiles(name):
        return False
    with merge.method.blamed(name):
        run = _prepare_run(merge, name)
    return run is not None and _write_chunks(run, info.elements, out, write)


def _prepare_run(merge: Prepared, name: str) -> Run | None:
    """Make the function that merges a tensor's chunks in compiled loops; None if the method has no loops for it."""
    loops = merge.method.compiled
    if merge.method.coefficients:
        return _linear_combination(merge, name)
    assert loops is not None
    return _average(merge, name, loops) if loops.combine == Combine.AVERAGE else _task_vectors(merge, name, loops)


def _write_chunks(run: Run, size: int, out: str, write: Write) -> bool:
    width = DTYPES[out].size
    buffer = np.empty(max(stop - start for start, stop in chunks(size)) * width, np.uint8)
    for start, stop in chunks(size):
        if run(start, stop, np.uint64(buffer.ctypes.data)):
            return False
        write(buffer.data[: (stop - start) * width], start * width)
    return True


def _average(merge: Prepared, name: str, loops: Loops) -> Run | None:
    """Make the function that computes the weighted sum of the models' own weights, chunk by chunk."""
    values = merge.parameters(name)
    weights = values.get(loops.weight, [1.0] * len(merge.experts))
    normalize = bool(values.get("normalize"))
    total = sum(weights)
    if normalize and cancel_out(weights):
        return None
    inputs = Inputs([expert.model for expert in merge.experts], name)
    return _weighted(inputs, weights, merge.layout[name][0], normalize=normalize, divisor=total if normalize else 1)


def _linear_combination(merge: Prepared, name: str) -> Run | None:
    """Make the function for a linear combination whose coefficients follow from the dot products of its tensors."""
    with_base = merge.adds_to_base or merge.method.takes_base
    inputs = Inputs(merge.models if with_base else [expert.model for expert in merge.experts], name)
    if not inputs.known:
        return None
    gram = inputs.gram(relative=merge.adds_to_base)
    if not np.isfinite(gram).all():
        return None
    try:
        coefficients = merge.coefficients(name, gram)
    except ValueError:
        return None
    if coefficients is None:
        return None
    if merge.adds_to_base:
        return _task_vectors(merge, name, Loops(Combine.SUM), coefficients)
    if merge.method.takes_base:  # at the ends of SLERP the result is one of the models, byte by byte
        chosen = [i for i, coefficient in enumerate(coefficients) if coefficient]
        inputs = Inputs([merge.models[i] for i in chosen], name)
        coefficients = [coefficients[i] for i in chosen]
    return _weighted(inputs, coefficients, merge.layout[name][0], signed=not merge.method.takes_base)


def _weighted(
    inputs: Inputs, weights: list[float], out: str, *, normalize: bool = False, signed: bool = True, divisor: float = 1
) -> Run | None:
    if not inputs.known:
        return None
    w, total, kind = np.array(weights, np.float32), np.float32(divisor), KINDS[out]

    def run(start: int, stop: int, address: np.uint64) -> bool:
        given = inputs.addresses, inputs.kinds, start, stop, w, normalize, signed, total, address, kind
        return bool(kernels.average(*given))

    return run


def _task_vectors(merge: Prepared, name: str, loops: Loops, weights: list[float] | None = None) -> Run | None:
    """Make the function that sparsifies and combines task vectors, or sums them by `weights`, and adds the base."""
    values, count, out = merge.parameters(name), len(merge.experts), merge.layout[name][0]
    active = merge.active(name, values)
    if "density" in values and not any(active):  # the base comes out as it is
        return _weighted(Inputs([merge.base], name), [1.0], out)
    values = values if weights is None else {}  # the given coefficients depend on the values already
    densities = values.get("density", [1.0] * count)
    inputs = Inputs(merge.models, name)
    shape = merge.base.tensors[name].shape or (1,)
    scales = ScaleLayouts([*merge.scales(name), merge.factors.get(name)], shape)
    if not inputs.known or not scales.known:
        return None
    random, columns = merge.method.random, shape[-1]
    keys = np.array([merge.stream(expert, name).key if random else 0 for expert in merge.experts], np.uint64)
    pairs = [_pair(inputs, i, columns, scales) for i in range(count)]
    kept = [_kept(loops, values, i, pair, keys[i] if random else None) for i, pair in enumerate(pairs)]
    varied = None
    if loops.most_varied and values[loops.most_varied] < 1:
        varied = Varied(inputs.addresses, inputs.kinds, inputs.size, values[loops.most_varied])
    if weights is None:
        weights = _weights(loops, values, merge.method.arguments(values), inputs, varied)
    normalize, total = loops.combine == Combine.VOTE or bool(values.get("normalize")), sum(weights)
    divides = normalize and loops.combine == Combine.SUM and abs(total) >= 1e-8
    arguments = (
        scales.addresses[:-1], np.array([k.thresholds for k in kept]), np.array([k.cuts for k in kept]), random, keys,
        np.array(densities, np.float32), np.array([k.factor for k in kept]), np.array(weights, np.float32),
        np.array(active, np.bool_), int(loops.combine), normalize, np.float32(total if divides else 1),
        np.float32(values.get("lambda", 1)),
        np.float32(values[loops.threshold]) if loops.threshold else least_divisor(weights),
        values[loops.at_least] if loops.at_least else 0,
    )  # fmt: skip

    def run(start: int, stop: int, address: np.uint64) -> bool:  # holds `inputs` and `scales`, and so their memory
        masks = [varied.kept(start, stop)] * count if varied else [k.mask(start, stop) for k in kept]
        where = np.array([address_of(mask) for mask in masks], np.uint64)
        given = inputs.addresses, inputs.kinds, start, stop, columns, *arguments, scales.addresses[-1]
        return bool(kernels.merge_task_vectors(*given, where, address, KINDS[out]))

    return run


def _pair(inputs: Inputs, expert: int, columns: int, scales: ScaleLayouts) -> Pair:
    """The base's tensor and an expert's, with the scale that its elements are ranked by."""
    (base, own), kinds = inputs.addresses[[0, expert + 1]], inputs.kinds
    return Pair(base, int(kinds[0]), own, int(kinds[expert + 1]), inputs.size, columns, scales.addresses[expert])


def _kept(loops: Loops, values: dict[str, Any], expert: int, pair: Pair, key: np.uint64 | None) -> Kept:
    """The part of one expert's task vector that is kept with the method's parameters `values`."""
    return Kept(
        pair,
        values["density"][expert] if "density" in values else 1.0,
        outliers=values[loops.outliers][expert] if loops.outliers else 0.0,
        key=key,
        rank_width=values[loops.rank_width][expert] if loops.rank_width else None,
        rescale=bool(values.get("rescale")),
    )


def _weights(
    loops: Loops, values: dict[str, Any], arguments: dict[str, Any], inputs: Inputs, varied: Varied | None
) -> list[float]:
    if loops.weights_by_energy:
        return loops.weights_by_energy(inputs.energies(varied))
    if loops.weights_by_owners:
        return loops.weights_by_owners(inputs.owned(values[loops.threshold]), **arguments)
    weights: list[float] = values.get(loops.weight, [1.0] * (len(inputs.addresses) - 1))
    return weights


class Inputs:
    """One tensor of several models, given by addresses; keeps the models' files mapped into memory.

    Attributes:
        known: whether the kernels can read every dtype.
        size: number of elements.
        addresses: of each model's bits; uint64, shape (models,).
        kinds: the kernels' number of each dtype, -1 if they have none; int64, shape (models,).
    """

    def __init__(self, models: Sequence[Model], name: str) -> None:
        raw = [model.raw(name) for model in models]
        self.known = all(dtype in KINDS for dtype, _ in raw)
        self._arrays = [bits if bits.ctypes.data % bits.itemsize == 0 else bits.copy() for _, bits in raw]
        self.size = self._arrays[0].size
        self.addresses = np.array([bits.ctypes.data for bits in self._arrays], np.uint64)
        self.kinds = np.array([KINDS.get(dtype, -1) for dtype, _ in raw], np.int64)

    def gram(self, *, relative: bool) -> np.ndarray:
        """The dot products (`sums.gram`) of these tensors or, with `relative`, of their differences to the first."""
        count, first = len(self.addresses), int(relative)
        pairs = np.array(list(itertools.combinations_with_replacement(range(first, count), 2)), np.int64)
        found = np.zeros((count - first, count - first))
        for (i, j), dot in zip(pairs - first, self._dots(pairs, relative=relative), strict=True):
            found[i, j] = found[j, i] = dot
        return found

    def energies(self, chosen: Varied | None) -> list[float]:
        """The squared L2 norm of each model's difference to the first one, of the chosen elements or of all."""
        return self._dots(np.array([(i, i) for i in range(1, len(self.addresses))], np.int64), chosen, relative=True)

    def _dots(self, pairs: np.ndarray, chosen: Varied | None = None, *, relative: bool) -> list[float]:
        blocks = np.empty((-(-self.size // kernels.BLOCK), len(pairs)))
        for start, stop in chunks(self.size):
            mask = chosen.kept(start, stop) if chosen else None
            part = blocks[start // kernels.BLOCK : -(-stop // kernels.BLOCK)]
            kernels.dots(self.addresses, self.kinds, self.size, relative, pairs, address_of(mask), start, part)
        return [exact_sum(column.tolist()) for column in blocks.T]

    def owned(self, threshold: float) -> list[tuple[int, int]]:
        """For each model after the first: how many elements differ from the first's by more than `threshold`.

        Returns:
            For each of them, that number, and how many of these elements differ in no other model.
        """
        counts = np.empty((len(self.addresses) - 1, 2), np.int64)
        kernels.owned(self.addresses, self.kinds, self.size, np.float32(threshold), counts)
        return [(int(moved), int(alone)) for moved, alone in counts]


class ScaleLayouts:
    """Factors of the elements of one tensor, laid out as `kernels._times` reads them; keeps them in memory.

    Attributes:
        addresses: of each layout, 0 for no factors; uint64, shape (scales,).
        known: whether every scale can be laid out in this way: it must broadcast along the last dimensions before the
            columns, or along none.
    """

    def __init__(self, scales: Sequence[torch.Tensor | None], shape: tuple[int, ...]) -> None:
        """Write each scale in the order in which the compiled loops read it.

        Args:
            scales: fp32, each broadcasts to the tensor; None for no factors.
            shape: of the tensor.
        """
        self._arrays, self.known = list[np.ndarray](), True
        self.addresses = np.zeros(len(scales), np.uint64)
        for i, scale in enumerate(scales):
            if scale is not None:
                *rows, width = (1,) * (len(shape) - scale.dim()) + tuple(scale.shape)
                while rows and rows[-1] == 1:
                    rows.pop()
                self.known &= tuple(rows) == shape[: len(rows)]
                height = math.prod(shape[len(rows) : -1]) if rows else 0
                factors = np.ascontiguousarray(scale.numpy(), np.float32)
                layout = np.array([factors.ctypes.data, height, width], np.int64)
                self._arrays += factors, layout
                self.addresses[i] = layout.ctypes.data
