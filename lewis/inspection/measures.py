"""Measure the weights of base and experts in one pass: how far and where each tensor moved, and what is broken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lewis.models.model import Model
from lewis.models.names import PER_TOKEN, layer_of
from lewis.progress import Report, silent
from lewis.threads import cores

SEMANTICS = "3"  # raise it when the same models get other measures
SAMPLE = 1 << 14  # elements of a tensor that decide whether all are read
_CHUNK = 1 << 15  # elements of each model that are decoded at a time
_ROWS, _COLUMNS = 16, 512  # of each matrix, that are searched for rounded values


@dataclass(frozen=True)
class TensorMeasures:
    """The measures of one tensor. Lists with an item for each model begin with the base.

    Attributes:
        name: name of the tensor.
        elements: how many elements were measured: all, or the sample.
        matrix: whether it is a matrix in a layer.
        gram: dot products of the base and the experts' task vectors, shape (models, models), upper triangle.
        unchanged: for each expert, how many elements equal the base's; all, if it has no such tensor.
        signs: pairs of experts that moved the same elements, as `loops.measure` counts them, shape (experts, experts).
        peaks: largest finite magnitude of each model.
        nans, infinities: number of NaN and of infinite elements of each model.
        distinct: share of distinct values among the first elements of some rows, of each model; 0 if not measured.
    """

    name: str
    elements: int
    matrix: bool
    gram: list[list[float]]
    unchanged: list[int]
    signs: list[list[int]]
    peaks: list[float]
    nans: list[int]
    infinities: list[int]
    distinct: list[float]

    @property
    def layer(self) -> int | None:
        """The number of the layer that the tensor is in; None outside of the layers."""
        return layer_of(self.name)

    def size(self, expert: int) -> float:
        """Norm of an expert's task vector, divided by that of the base; NaN if the base is 0."""
        return _ratio(self.gram[expert][expert], self.gram[0][0])

    def cosine(self, expert: int) -> float:
        """Cosine of an expert's weights with the base's; NaN if one of them is 0."""
        return _cosine(np.array(self.gram), expert)

    def scale(self, expert: int) -> float:
        """Norm of an expert's weights, divided by that of the base; NaN if the base is 0."""
        weights = self.gram[0][0] + 2 * self.gram[0][expert] + self.gram[expert][expert]
        return _ratio(max(weights, 0.0), self.gram[0][0])


@dataclass(frozen=True)
class Measures:
    """The measures of one pass. Experts are numbered from 1, as the rows of `gram` are; 0 is the base.

    Attributes:
        models: number of models, the base included.
        tensors: measures of each tensor, in the base's order.
    """

    models: int
    tensors: tuple[TensorMeasures, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the measures as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measures:
        """Make the measures from what `to_json` returned."""
        return cls(data["models"], tuple(TensorMeasures(**each) for each in data["tensors"]))

    @cached_property
    def gram(self) -> np.ndarray:
        """Sum of the dot products of all tensors, symmetric, shape (models, models)."""
        total = np.zeros((self.models, self.models))
        for tensor in self.tensors:
            total += np.array(tensor.gram)
        return np.triu(total) + np.triu(total, 1).T

    def size(self, expert: int, tensors: Iterable[TensorMeasures] | None = None) -> float:
        """Norm of an expert's task vector over some or all tensors, divided by that of the base."""
        chosen = list(self.tensors if tensors is None else tensors)
        return _ratio(sum(each.gram[expert][expert] for each in chosen), sum(each.gram[0][0] for each in chosen))

    def cosine(self, expert: int) -> float:
        """Cosine of an expert's weights with the base's."""
        return _cosine(self.gram, expert)

    def typical_cosine(self, expert: int) -> float:
        """The upper quartile of the cosines of an expert's matrices with the base's; 1 if there are none.

        In a model with layers in another order, most matrices have another direction; in an unrelated model, all have.
        """
        cosines = [value for each in self.matrices() if np.isfinite(value := each.cosine(expert))]
        return float(np.quantile(cosines, 0.75)) if cosines else 1.0

    def between(self, one: int, other: int) -> float:
        """Cosine of two experts' task vectors; NaN if one of them is 0."""
        gram = self.gram
        return float(gram[one, other] / root) if (root := np.sqrt(gram[one, one] * gram[other, other])) else np.nan

    def conflict(self, one: int, other: int) -> float:
        """Share of the elements that two experts both moved which they moved in opposite directions; NaN if none."""
        first, second = sorted((one - 1, other - 1))
        both = sum(each.signs[first][second] for each in self.tensors)
        return sum(each.signs[second][first] for each in self.tensors) / both if both else np.nan

    def unchanged(self, expert: int) -> float:
        """Share of an expert's elements that equal the base's."""
        every = sum(each.elements for each in self.tensors)
        return sum(each.unchanged[expert - 1] for each in self.tensors) / every if every else 1.0

    def matrices(self) -> list[TensorMeasures]:
        """The nonzero matrices in layers. Norms and biases are alike in all models, so they do not show descent."""
        return [each for each in self.tensors if each.matrix and each.gram[0][0] > 0]

    def by_layer(self, expert: int) -> dict[int, float]:
        """Layer -> size of an expert's task vector in it."""
        layers: dict[int, list[TensorMeasures]] = {}
        for each in self.tensors:
            if each.layer is not None:
                layers.setdefault(each.layer, []).append(each)
        return {layer: self.size(expert, layers[layer]) for layer in sorted(layers)}


def measure(
    base: Model,
    experts: Sequence[Model],
    report: Report = silent,
    *,
    per_token: bool = True,
    most: int | None = None,
) -> Measures:
    """Read all weights once and measure them, or a sample of them.

    Args:
        base: the model that task vectors are differences to.
        experts: in the order of their numbers, from 1. A tensor that one of them lacks, or has in another shape, counts
            as unchanged.
        report: called with ("inspect", elements done, elements in all).
        per_token: whether embeddings and heads are measured, which is meaningless if vocabularies differ in order.
        most: read only so many elements of each tensor, the first ones, and leave out tensors that are computed; None:
            read all elements of all tensors.
    """
    wanted = {name: info for name, info in base.tensors.items() if per_token or not name.endswith(PER_TOKEN)}
    names = [name for name, info in wanted.items() if info.floating]
    if most is not None:
        names = [name for name in names if not any(model.computes(name) for model in (base, *experts))]
    total, done = sum(base.tensors[name].elements for name in names), 0
    found: dict[str, TensorMeasures] = {}
    largest_first = sorted(names, key=lambda name: -base.tensors[name].elements)  # so that all threads end together
    with ThreadPoolExecutor(cores()) as pool:
        for each in pool.map(lambda name: _of_tensor(name, base, experts, most), largest_first):
            found[each.name] = each
            done += each.elements
            report("inspect", done, total)
    return Measures(1 + len(experts), tuple(found[name] for name in names))


def weights(model: Model, name: str) -> np.ndarray:
    """Return a tensor of a model as an fp32 array of the tensor's shape."""
    dtype, bits = model.raw(name)
    out = np.empty(bits.size, np.float32)
    _load(dtype, bits, out)
    return out.reshape(model.tensors[model.tied.get(name, name)].shape)


def has(model: Model, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a model has a tensor of this name and shape."""
    info = model.tensors.get(model.tied.get(name, name))
    return info is not None and info.shape == shape and info.floating


def _of_tensor(name: str, base: Model, experts: Sequence[Model], most: int | None) -> TensorMeasures:
    from lewis.inspection import loops

    info = base.tensors[name]
    models = [base, *(expert if has(expert, name, info.shape) else base for expert in experts)]
    for model in models if most is None else ():
        model.will_need(name)
    raw = [model.raw(name) for model in models]
    count, size = len(models), min(info.elements, most or info.elements)
    values = np.empty((count, min(size, _CHUNK)), np.float32)
    gram, unchanged = np.zeros((count, count)), np.zeros(count - 1, np.int64)
    signs, broken = np.zeros((count - 1, count - 1), np.int64), np.zeros((2, count), np.int64)
    peaks, largest = np.zeros(count), np.zeros(count)
    for start in range(0, size, _CHUNK):
        length = min(_CHUNK, size - start)
        for k, (dtype, bits) in enumerate(raw):
            largest[k] = _load(dtype, bits[start : start + length], values[k, :length])
        if not np.isfinite(largest).all():
            largest = _without_broken(values[:, :length], broken)
        peaks = np.maximum(peaks, largest)
        before = gram.copy()
        loops.measure(values, length, gram, unchanged, signs)
        if not np.isfinite(gram).all():  # a square above fp32, as of a weight with a flipped bit of its exponent
            wide = values[:, :length].astype(np.float64)
            gram = before + np.triu(wide @ wide.T)
    matrix = layer_of(name) is not None and len(info.shape) > 1 and not name.endswith(PER_TOKEN)
    distinct = [_distinct(bits, info.shape) if matrix and most is None else 0.0 for _, bits in raw]
    for model in models:
        model.done_with(name)
    return TensorMeasures(
        *(name, size, matrix, gram.tolist(), unchanged.tolist(), signs.tolist()),
        *(peaks.tolist(), broken[0].tolist(), broken[1].tolist(), distinct),
    )


def _load(dtype: str, bits: np.ndarray, out: np.ndarray) -> float:
    """Read elements as fp32 into `out`; return the largest magnitude, which is infinity if an element is NaN."""
    from lewis.inspection import loops

    if bits.ctypes.data % bits.itemsize:
        bits = bits.copy()
    if dtype == "BF16":
        largest = loops.load_bf16(bits, out)
    else:
        if dtype in ("F16", "F64"):
            with np.errstate(over="ignore", invalid="ignore"):
                bits = bits.view(dtype.replace("F", "f").replace("16", "2").replace("64", "8")).astype(np.float32)
        largest = loops.load_fp32(bits.view(np.uint32), out)
    return float("inf") if largest >= loops.INFINITE else float(np.uint32(largest).view(np.float32))


def _without_broken(values: np.ndarray, broken: np.ndarray) -> np.ndarray:
    """Count elements that are not finite and replace them by the base's, so that the other elements are measured.

    Args:
        values: a row for each model, changed in place; where the base is not finite, all models get 0.
        broken: the numbers of NaN (row 0) and infinities (row 1) of each model are added to it.

    Returns:
        The largest finite magnitude of each model in this chunk.
    """
    broken[0] += np.isnan(values).sum(axis=1)
    broken[1] += np.isinf(values).sum(axis=1)
    bad = ~np.isfinite(values)
    values[:, bad[0]] = 0
    values[bad] = np.broadcast_to(values[0], values.shape)[bad]
    peaks: np.ndarray = np.abs(values).max(axis=1, initial=0)
    return peaks


def _distinct(bits: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return the share of distinct values among the first elements of some rows: low, if a matrix was quantised."""
    columns = shape[-1]
    if columns < 32 or not bits.size:
        return 0.0
    rows = bits.reshape(-1, columns)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).astype(np.int64)
    sample = np.sort(rows[chosen, :_COLUMNS], axis=1)
    return float((np.count_nonzero(np.diff(sample), axis=None) + len(chosen)) / sample.size)


def _ratio(part: float, whole: float) -> float:
    return float(np.sqrt(part / whole)) if whole > 0 else float("nan")


def _cosine(gram: np.ndarray, expert: int) -> float:
    """The cosine between base and expert; `gram` has the dot products of the base and the task vectors."""
    base, across, moved = gram[0, 0], gram[0, expert], gram[expert, expert]
    root = np.sqrt(base * max(base + 2 * across + moved, 0.0))
    return float((base + across) / root) if root > 1e-6 * base else float("nan")
