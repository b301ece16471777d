"""Merge tensors with the compiled loops of `kernels`, a chunk at a time, straight from the mapped files.

What it writes equals, byte for byte, what the method's own function gives in torch. Where it cannot promise that (a
method without a compiled loop, fp64, a number that is not finite) it says so, and the function is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis import kernels
from lewis.kernels import KINDS
from lewis.methods.sums import exact_sum
from lewis.selection import Pair, Selector
from lewis.writer import SIZES

if TYPE_CHECKING:
    import torch

    from lewis.merge import Merge

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_CHUNK = 1 << 19  # elements that are written at a time
_own = threading.local()

Write = Callable[[memoryview, int], None]
"""Called with bytes and their offset in the tensor."""


def merge_tensor(merge: Merge, name: str, write: Write) -> bool:
    """Merge one tensor into `write`.

    Returns:
        False if it has to be done by the method's function; then what was written is void.

    Raises:
        LewisError: as `write`.
    """
    info, (out, _) = merge.base.tensors[name], merge.layout[name]
    if merge.method.name not in METHODS or merge.method.origin or info.dtype not in KINDS or out not in KINDS:
        return False
    if info.elements == 0:
        return True
    run = (_average if merge.method.name == "linear" else _task_vectors)(merge, name)
    return run is not None and _in_chunks(run, info.elements, out, write)


Run = Callable[[int, int, np.uint64], bool]
"""Merges the elements from start to stop to an address; gives whether a number is not finite."""


def _in_chunks(run: Run, size: int, out: str, write: Write) -> bool:
    width = SIZES[out]
    buffer = np.empty(min(size, _CHUNK) * width, np.uint8)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        if run(start, stop, np.uint64(buffer.ctypes.data)):
            return False
        write(buffer.data[: (stop - start) * width], start * width)
    return True


class _Inputs:
    """One tensor of several models, as the kernels take them; keeps their memory mapped."""

    def __init__(self, models: list[Any], name: str) -> None:
        raw = [model.raw(name) for model in models]
        self.known = all(dtype in KINDS for dtype, _ in raw)
        self._arrays = [bits if bits.ctypes.data % bits.itemsize == 0 else bits.copy() for _, bits in raw]
        self.addresses = np.array([bits.ctypes.data for bits in self._arrays], np.uint64)
        self.kinds = np.array([KINDS.get(dtype, -1) for dtype, _ in raw], np.int64)


def _average(merge: Merge, name: str) -> Run | None:
    values = merge.parameters(name)
    weights, total, normalize = values["weight"], sum(values["weight"]), bool(values["normalize"])
    if normalize and total == 0:
        return None
    inputs = _Inputs([expert.model for expert in merge.experts], name)
    return _weighted(inputs, weights, normalize, total if normalize else 1, merge.layout[name][0])


def _weighted(inputs: _Inputs, weights: list[float], normalize: bool, divisor: float, out: str) -> Run | None:
    if not inputs.known:
        return None
    w, total, kind = np.array(weights, np.float32), np.float32(divisor), KINDS[out]

    def run(start: int, stop: int, address: np.uint64) -> bool:
        return bool(kernels.average(inputs.addresses, inputs.kinds, start, stop, w, normalize, total, address, kind))

    return run


def _task_vectors(merge: Merge, name: str) -> Run | None:
    values, experts = merge.parameters(name), merge.experts
    count, size = len(experts), merge.base.tensors[name].elements
    active, densities = merge.active(name, values), values.get("density", [1.0] * count)
    if "density" in values and not any(active):  # the base comes out as it is
        return _weighted(_Inputs([merge.base], name), [1.0], False, 1.0, merge.layout[name][0])
    inputs = _Inputs([merge.base, *(expert.model for expert in experts)], name)
    if not inputs.known:
        return None
    columns = (merge.base.tensors[name].shape or (1,))[-1]
    scales, held = _by_column(merge.scales(name), columns), _by_column([merge.held_back.get(name)], columns)
    if scales is None or held is None:
        return None
    by_column = np.array([0 if scale is None else scale.ctypes.data for scale in scales], np.uint64)
    dropping = merge.method.random
    keys = np.array([merge.stream(expert, name).key for expert in experts] if dropping else [0] * count, np.uint64)
    thresholds, cuts = np.zeros(count, np.uint32), np.full(count, kernels.ALL, np.uint64)
    factors, limits = np.ones(count, np.float32), np.array(densities, np.float32)
    for e in range(count):
        pair = Pair(
            (inputs.addresses[0], int(inputs.kinds[0]), inputs.addresses[e + 1], int(inputs.kinds[e + 1]), size,
             columns, by_column[e])
        )  # fmt: skip
        whole = densities[e] >= 1 if dropping else int(densities[e] * size) >= size
        if whole:
            continue
        if not dropping:
            thresholds[e], cuts[e] = _selector().cut(pair, int(densities[e] * size))
        if values.get("rescale"):
            factors[e] = _factor(pair, thresholds[e], cuts[e], dropping, keys[e], limits[e])
    elect = merge.method.name in ("ties", "dare_ties")
    total = sum(values["weight"])
    divides = bool(values["normalize"]) and not elect and abs(total) >= 1e-8
    arguments = (
        by_column,
        thresholds, cuts, dropping, keys, limits, factors, np.array(values["weight"], np.float32),
        np.array(active, np.bool_), elect, bool(values["normalize"]),
        np.float32(total if divides else 1), np.float32(values["lambda"]),
        np.uint64(0 if held[0] is None else held[0].ctypes.data),
    )  # fmt: skip
    out = KINDS[merge.layout[name][0]]

    def run(start: int, stop: int, address: np.uint64) -> bool:
        assert scales is not None and held is not None  # and kept in memory
        return bool(
            kernels.merge_task_vectors(
                inputs.addresses, inputs.kinds, start, stop, columns, *arguments, address, out
            )
        )  # fmt: skip

    return run


def _by_column(given: Sequence[torch.Tensor | None], columns: int) -> list[np.ndarray | None] | None:
    """Scales as fp32 by column, None for none; no list if one is not by column."""
    scales: list[np.ndarray | None] = []
    for scale in given:
        if scale is not None and tuple(scale.shape) != (columns,):
            return None
        scales.append(None if scale is None else np.ascontiguousarray(scale.numpy(), np.float32))
    return scales


def _factor(
    pair: Pair, threshold: np.uint32, cut: np.uint64, dropping: bool, key: np.uint64, density: np.float32
) -> np.float32:
    """What brings the kept task vector back to its L1 norm: `sparsify.match_l1`."""
    blocks = -(-pair.size // kernels.BLOCK)
    whole, kept = np.empty(blocks), np.empty(blocks)
    kernels.norms(*pair.addresses, threshold, cut, dropping, key, density, whole, kept)
    before, after = exact_sum(whole.tolist()), exact_sum(kept.tolist())
    return np.float32(1) if after == 0 or before == after else np.float32(before / after)


def _selector() -> Selector:
    if not hasattr(_own, "selector"):
        _own.selector = Selector()
    selector: Selector = _own.selector
    return selector
