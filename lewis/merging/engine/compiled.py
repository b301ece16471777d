"""Merge tensors with the compiled loops of `kernels`, a chunk at a time, straight from the mapped files.

The output equals, byte for byte, that of the method's own function in torch. Where that cannot be promised (a
method without compiled loops, fp64, a number that is not finite) `merge_tensor` returns False, and the caller merges
the tensor in torch. Which loops a method needs is data in its decorator: `lewis.methods.loops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lewis.merging.engine import kernels
from lewis.merging.engine.inputs import Inputs, ScaleLayouts
from lewis.merging.engine.kernels import KINDS
from lewis.merging.engine.selection import Kept, Pair, Varied, address_of
from lewis.merging.memory_budget import chunks
from lewis.merging.prepared import Prepared
from lewis.methods.arithmetic.sums import cancel_out, least_divisor
from lewis.methods.loops import Combine, Loops
from lewis.models.dtypes import DTYPES

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
