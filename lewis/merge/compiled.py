"""Merge tensors with the compiled loops of `kernels`, a chunk at a time, straight from the mapped files.

What it writes equals, byte for byte, what the method's own function gives in torch. Where it cannot promise that (a
method without a compiled loop, fp64, a number that is not finite) it says so, and the function is called.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lewis.merge import kernels
from lewis.merge.kernels import KINDS
from lewis.merge.selection import EVERYTHING, NOTHING, Pair, Ranks, Selector, Spread
from lewis.methods.arithmetic.sums import exact_sum
from lewis.methods.ram import scale_alone
from lewis.methods.sce import shares
from lewis.models.dtypes import DTYPES

if TYPE_CHECKING:
    import torch

    from lewis.merge.run import Merge

_HOW = {
    **dict.fromkeys(("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"), kernels.SUM),
    **dict.fromkeys(("ties", "dare_ties", "breadcrumbs_ties", "della"), kernels.ELECT),
    **{"sce": kernels.VOTE, "consensus": kernels.CLAIM, "nearswap": kernels.NEAR},
    **dict.fromkeys(("ram", "ramplus_tl"), kernels.SHARE),
}
_SELECTIVE = {"consensus": "tall_lambda", "ram": "epsilon", "ramplus_tl": "epsilon", "nearswap": "t"}
METHODS = ("linear", "passthrough", *_HOW)  # and those that are linear combinations
_CHUNK = 1 << 19  # elements that are written at a time; whole blocks
_own = threading.local()

Write = Callable[[memoryview, int], None]
"""Called with bytes and their offset in the tensor."""


def takes(merge: Merge, name: str) -> bool:
    """Whether there are compiled loops for one tensor's method and parameters."""
    method, values = merge.method, merge.parameters(name)
    if method.coefficients:
        try:
            return method.coefficients(np.eye(len(merge.experts) + method.takes_base), **values) is not None
        except ValueError:  # the method's function tells it
            return False
    return method.name in METHODS and not method.origin


def merge_tensor(merge: Merge, name: str, write: Write) -> bool:
    """Merge one tensor into `write`.

    Returns:
        False if it has to be done by the method's function; then what was written is void.

    Raises:
        LewisError: as `write`.
    """
    info, (out, _) = merge.base.tensors[name], merge.layout[name]
    if info.elements == 0:
        return True
    if info.dtype not in KINDS or out not in KINDS or not takes(merge, name):
        return False
    if merge.method.coefficients:
        run = _combined(merge, name)
    else:
        run = (_task_vectors if merge.method.name in _HOW else _average)(merge, name)
    return run is not None and _in_chunks(run, info.elements, out, write)


Run = Callable[[int, int, np.uint64], bool]
"""Merges the elements from start to stop to an address; gives whether a number is not finite."""


def _in_chunks(run: Run, size: int, out: str, write: Write) -> bool:
    width = DTYPES[out].size
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
        self.size = self._arrays[0].size
        self.addresses = np.array([bits.ctypes.data for bits in self._arrays], np.uint64)
        self.kinds = np.array([KINDS.get(dtype, -1) for dtype, _ in raw], np.int64)

    def gram(self, *, relative: bool) -> np.ndarray:
        """`sums.gram` of these tensors, or of their differences to the first one."""
        count, first = len(self.addresses), int(relative)
        pairs = np.array(list(itertools.combinations_with_replacement(range(first, count), 2)), np.int64)
        found = np.zeros((count - first, count - first))
        for (i, j), dot in zip(pairs - first, self._dots(pairs, relative=relative), strict=True):
            found[i, j] = found[j, i] = dot
        return found

    def energies(self, chosen: Spread | None) -> list[float]:
        """`sums.inner` of the differences to the first one, each with itself; of the elements that are chosen."""
        return self._dots(np.array([(i, i) for i in range(1, len(self.addresses))], np.int64), chosen, relative=True)

    def _dots(self, pairs: np.ndarray, chosen: Spread | None = None, *, relative: bool) -> list[float]:
        blocks = np.empty((-(-self.size // kernels.BLOCK), len(pairs)))
        for start in range(0, self.size, _CHUNK):
            mask = chosen.kept(start, min(start + _CHUNK, self.size)) if chosen else None
            part = blocks[start // kernels.BLOCK : (start + _CHUNK) // kernels.BLOCK]
            kernels.dots(self.addresses, self.kinds, self.size, relative, pairs, _address(mask), start, part)
        return [exact_sum(column.tolist()) for column in blocks.T]

    def owned(self, least: float) -> np.ndarray:
        """How many elements each model changed by more than `least` of the first one's, and how many alone."""
        counts = np.empty((len(self.addresses) - 1, 2), np.int64)
        kernels.owned(self.addresses, self.kinds, self.size, np.float32(least), counts)
        return counts


class _Scales:
    """What the elements of a tensor are multiplied with, as `kernels._times` takes it; keeps it in memory.

    Attributes:
        addresses: of each; uint64.
        known: whether each can be told so: it broadcasts along the last dimensions before the columns, or along none.
    """

    def __init__(self, scales: Sequence[torch.Tensor | None], shape: tuple[int, ...]) -> None:
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


def _average(merge: Merge, name: str) -> Run | None:
    values = merge.parameters(name)
    weights, normalize = values["weight" if "weight" in values else "scale"], bool(values.get("normalize"))
    total = sum(weights)
    if normalize and total == 0:
        return None
    inputs = _Inputs([expert.model for expert in merge.experts], name)
    return _weighted(inputs, weights, merge.layout[name][0], normalize=normalize, divisor=total if normalize else 1)


def _combined(merge: Merge, name: str) -> Run | None:
    """A linear combination whose coefficients follow from the dot products of its tensors."""
    values, models = merge.parameters(name), [expert.model for expert in merge.experts]
    with_base = merge.adds_to_base or merge.method.takes_base
    inputs = _Inputs([merge.base, *models] if with_base else models, name)
    if not inputs.known:
        return None
    gram = inputs.gram(relative=merge.adds_to_base)
    if not np.isfinite(gram).all():
        return None
    assert merge.method.coefficients
    try:
        coefficients = merge.method.coefficients(gram, **values)
    except ValueError:
        return None
    assert coefficients is not None
    if merge.adds_to_base:
        return _task_vectors(merge, name, coefficients)
    if merge.method.takes_base:  # the ends of SLERP are the models, byte by byte
        chosen = [i for i, coefficient in enumerate(coefficients) if coefficient]
        inputs = _Inputs([[merge.base, *models][i] for i in chosen], name)
        coefficients = [coefficients[i] for i in chosen]
    return _weighted(inputs, coefficients, merge.layout[name][0], signed=not merge.method.takes_base)


def _weighted(
    inputs: _Inputs, weights: list[float], out: str, *, normalize: bool = False, signed: bool = True, divisor: float = 1
) -> Run | None:
    if not inputs.known:
        return None
    w, total, kind = np.array(weights, np.float32), np.float32(divisor), KINDS[out]

    def run(start: int, stop: int, address: np.uint64) -> bool:
        given = inputs.addresses, inputs.kinds, start, stop, w, normalize, signed, total, address, kind
        return bool(kernels.average(*given))

    return run


def _task_vectors(merge: Merge, name: str, weights: list[float] | None = None) -> Run | None:
    """Of a method on task vectors; `weights` are the recipe's unless they are given."""
    values, experts = merge.parameters(name), merge.experts
    count, size = len(experts), merge.base.tensors[name].elements
    active, densities = merge.active(name, values), values.get("density", [1.0] * count)
    if "density" in values and not any(active):  # the base comes out as it is
        return _weighted(_Inputs([merge.base], name), [1.0], merge.layout[name][0])
    inputs = _Inputs([merge.base, *(expert.model for expert in experts)], name)
    if not inputs.known:
        return None
    shape = merge.base.tensors[name].shape or (1,)
    scales, columns = _Scales([*merge.scales(name), merge.held_back.get(name)], shape), shape[-1]
    if not scales.known:
        return None
    dropping = merge.method.random
    keys = np.array([merge.stream(expert, name).key for expert in experts] if dropping else [0] * count, np.uint64)
    kept = []
    for e in range(count):
        pair = Pair(
            (inputs.addresses[0], int(inputs.kinds[0]), inputs.addresses[e + 1], int(inputs.kinds[e + 1]), size,
             columns, scales.addresses[e])
        )  # fmt: skip
        own = {key: value[e] for key, value in values.items() if isinstance(value, list)}
        kept.append(_Kept(pair, own, dropping, keys[e], rescale=bool(values.get("rescale"))))
    how, chosen = _HOW.get(merge.method.name, kernels.SUM), None
    if merge.method.name == "sce":
        if values["select_topk"] < 1:
            chosen = Spread(inputs.addresses, inputs.kinds, size, values["select_topk"])
        weights = shares(inputs.energies(chosen))
    elif merge.method.name == "ramplus_tl":
        counts = inputs.owned(values["epsilon"])
        weights = [scale_alone(alone, moved - alone, values["r"], values["alpha"]) for moved, alone in counts.tolist()]
    weights = values.get("weight", [1.0] * count) if weights is None else weights
    normalize, total = bool(values.get("normalize", how == kernels.VOTE)), sum(weights)
    divides = normalize and how == kernels.SUM and abs(total) >= 1e-8
    selective = values.get(_SELECTIVE.get(merge.method.name, ""), 0)
    arguments = (
        scales.addresses[:-1], np.array([k.thresholds for k in kept]), np.array([k.cuts for k in kept]), dropping, keys,
        np.array(densities, np.float32), np.array([k.factor for k in kept]), np.array(weights, np.float32),
        np.array(active, np.bool_), how, normalize, np.float32(total if divides else 1),
        np.float32(values.get("lambda", 1)), np.float32(selective), values.get("min_agree", 0),
    )  # fmt: skip
    out = KINDS[merge.layout[name][0]]

    def run(start: int, stop: int, address: np.uint64) -> bool:
        masks = [chosen.kept(start, stop)] * count if chosen else [k.mask(start, stop) for k in kept]
        where = np.array([_address(mask) for mask in masks], np.uint64)
        given = inputs.addresses, inputs.kinds, start, stop, columns, *arguments, scales.addresses[-1]
        return bool(kernels.merge_task_vectors(*given, where, address, out))

    return run


class _Kept:
    """What is kept of one task vector.

    Attributes:
        thresholds, cuts: it lies in the first cut, but not in the second; uint32 and uint64, two of each.
        factor: what brings it back to the L1 norm of the whole, if it was asked for; fp32.
    """

    def __init__(self, pair: Pair, values: Mapping[str, Any], dropping: bool, key: np.uint64, *, rescale: bool) -> None:
        """Find it.

        Args:
            pair: the tensor.
            values: the expert's own parameters.
            dropping: whether it is random.
            key: of the expert's stream.
            rescale: whether the factor is asked for.
        """
        density = values.get("density", 1.0)
        k = int(density * pair.size)
        self._ranks: Ranks | None = None
        within, without = EVERYTHING, NOTHING
        if density >= 1 if dropping else k >= pair.size:
            rescale = False
        elif "epsilon" in values and density > 0:
            self._ranks = Ranks(pair, key, density, values["epsilon"])
        elif not dropping:
            outliers = min(int(values.get("gamma", 0) * pair.size), pair.size - k) if k > 0 else 0
            within, without = _selector().cut(pair, outliers + k), _selector().cut(pair, outliers)
        self.thresholds = np.array([within[0], without[0]], np.uint32)
        self.cuts = np.array([within[1], without[1]], np.uint64)
        self.factor = self._factor(pair, dropping, key, np.float32(density)) if rescale else np.float32(1)

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        """If it is kept by rank: of the elements from `start` to `stop`, 1 for those that are, else 0; uint8."""
        return self._ranks.kept(start, stop) if self._ranks else None

    def _factor(self, pair: Pair, dropping: bool, key: np.uint64, density: np.float32) -> np.float32:
        """As `sparsify.match_l1`."""
        blocks = -(-pair.size // kernels.BLOCK)
        whole, kept = np.empty(blocks), np.empty(blocks)
        for start in range(0, pair.size, _CHUNK):
            mask = self.mask(start, min(start + _CHUNK, pair.size))
            part = slice(start // kernels.BLOCK, (start + _CHUNK) // kernels.BLOCK)
            kernels.norms(
                *pair.addresses, self.thresholds, self.cuts, dropping, key, density, _address(mask), start,
                whole[part], kept[part],
            )  # fmt: skip
        before, after = exact_sum(whole.tolist()), exact_sum(kept.tolist())
        return np.float32(1) if after == 0 or before == after else np.float32(before / after)


def _address(mask: np.ndarray | None) -> np.uint64:
    return np.uint64(0 if mask is None else mask.ctypes.data)


def _selector() -> Selector:
    if not hasattr(_own, "selector"):
        _own.selector = Selector()
    selector: Selector = _own.selector
    return selector
