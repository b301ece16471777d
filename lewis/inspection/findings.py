"""Findings that follow from the measured weights: about single tensors, experts, and pairs of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import median
from typing import Any

from lewis.inspection.kinds import Finding
from lewis.inspection.measures import Measures, TensorMeasures
from lewis.inspection.structure import odd_tensors

CHILD, NEAR = 0.2, 0.6  # cosines with the base: below the first it is no fine-tune, below the second a distant one
DISTANT = 0.5  # cosine from which on a tensor counts as replaced
RESCALED = 100.0  # factor, or divisor, of the base's norm from which on a tensor counts as rescaled
FEWEST = 16  # elements that a tensor must have so that its cosine is meaningful
LARGEST_HALF = 65504.0  # of float16
NOTHING = 1e-4  # relative size below which a task vector counts as next to nothing
ROUNDING = {"BF16": 1.2e-3, "F16": 1.5e-4}  # relative size of the difference that rounding alone makes
FEW, MANY = 1 / 20, 10.0  # bounds of a usual size, relative to the other experts'
SHARED = 0.5  # two experts share an origin if their distance is below this part of their distance to the base
ALIKE = 1e-4  # as SHARED, for two experts that differ only by rounding
AGAINST = -0.3  # cosine of two task vectors that undo each other
COARSE, COARSE_PART = 0.5, 0.1  # share of the base's distinct values in a coarse matrix; share of weights in such ones
_SHOWN = 3  # tensors that a finding names


def weight_findings(
    refs: Sequence[str],
    measures: Measures,
    moved: Sequence[Sequence[Mapping[str, Any]]],
    dtypes: Sequence[str],
    result: str | None,
    apart: Callable[[int, int], bool],
    *,
    among: bool,
) -> list[Finding]:
    """List all findings that follow from the measured weights.

    Args:
        refs: references of the base, the experts, and other possible bases.
        measures: measures of all these models, or of base and experts alone.
        moved: for each expert, the result of `structure.moved_parts`.
        dtypes: the dtype in which most elements are stored, of the base and of each expert.
        result: the dtype of the merged model, as safetensors names it; None: each tensor keeps the base's.
        apart: says of the numbers of two models whether they differ in weights that were not measured.
        among: whether the base is one of the experts, since the recipe has no base.
    """
    experts = range(1, len(dtypes))
    found, sizes = list(_broken(refs[0], 0, measures, result)), dict[int, float]()
    if damaged := [each for each in measures.tensors if _is_damaged(each, experts)]:
        facts = f"peak {damaged[0].peaks[0]:.2g}, in a fine-tune {min(damaged[0].peaks[i] for i in experts):.2g}"
        found.append(Finding("damaged base", refs[0], f"{_named([t.name for t in damaged])}: {facts} (the first)"))
        measures = replace(measures, tensors=tuple(each for each in measures.tensors if each not in damaged))
    for i in experts:
        found += _broken(refs[i], i, measures, result)
        found += [Finding(each["kind"], refs[i], each["what"]) for each in moved[i - 1]]
        found += _descent(refs, i, measures, range(experts.stop, measures.models))
        tensors, ordinary = _tensors(refs[i], i, measures, {name for each in moved[i - 1] for name in each["tensors"]})
        found += [*tensors, *_coarse(refs[i], i, measures)]
        sizes[i] = measures.size(i, ordinary)
    strange = {each.model for each in found if each.kind in ("wrong base", "far from base")}
    related = [i for i in experts if refs[i] not in strange]  # others' task vectors share the way between two bases
    for i in related:
        others = [sizes[j] for j in related if j != i and sizes[j] >= NOTHING]
        if among and not measures.gram[i, i] and not apart(0, i):
            found.append(Finding("expert twice", refs[i], f"its weights are those of {refs[0]}"))
            continue
        if not sizes[i] < NOTHING <= measures.size(i):  # else all that moved are tensors with findings of their own
            found += _amount(refs[i], sizes[i], others, dtypes[i], dtypes[0])
    for i, j in combinations(experts, 2):
        pair = _pair(refs, i, j, measures, apart)
        found += [each for each in pair if each.kind == "expert twice" or {i, j} <= {*related}]
    return found


def _tensors(
    ref: str, i: int, measures: Measures, moved: Collection[str]
) -> tuple[list[Finding], list[TensorMeasures]]:
    """Return findings on tensors that are all zeros, replaced or rescaled; and the tensors without any finding."""
    zeroed = _zeroed(i, measures)
    every = [t for t in _odd(i, measures) if t.name not in {*zeroed, *moved}]
    rescaled = [t for t in every if _is_rescaled(i, t)]
    odd = [t for t in every if t not in rescaled]
    found = [Finding("zeroed tensor", ref, f"all elements are 0 in {_named(zeroed)}")] if zeroed else []
    if rescaled:
        facts = f"peak {rescaled[0].peaks[i]:.2g}, in the base {rescaled[0].peaks[0]:.2g}"
        found += [Finding("rescaled", ref, f"{_named([t.name for t in rescaled])}: {facts} (the first)")]
    explained = {*zeroed, *moved, *(t.name for t in every)}
    return [*found, *_norms(ref, i, odd)], [t for t in measures.tensors if t.name not in explained]


def _is_damaged(tensor: TensorMeasures, experts: range) -> bool:
    """Whether the base has weights that no training gives, and that a fine-tune of it does not have."""
    return tensor.peaks[0] > max(LARGEST_HALF, RESCALED * min((tensor.peaks[i] for i in experts), default=math.inf))


def _is_rescaled(i: int, tensor: TensorMeasures) -> bool:
    """Whether a tensor is the base's times a factor that no training gives, of either sign.

    Biases do not count, since they may be nearly 0 in the base, nor do tensors with too few elements for a direction.
    """
    if tensor.elements < FEWEST or tensor.name.endswith("bias"):
        return False
    if tensor.scale(i) > RESCALED:
        return abs(tensor.cosine(i)) > DISTANT
    return 0 < tensor.peaks[i] * RESCALED < tensor.peaks[0]


def _broken(ref: str, i: int, measures: Measures, result: str | None) -> Iterator[Finding]:
    for kind, counts in (
        ("NaN", [t.nans[i] for t in measures.tensors]),
        ("overflow", [t.infinities[i] for t in measures.tensors]),
    ):
        if total := sum(counts):
            names = [t.name for t, count in zip(measures.tensors, counts, strict=True) if count]
            yield Finding(
                kind, ref, f"{total} elements are {'NaN' if kind == 'NaN' else 'infinity'} in {_named(names)}"
            )
    peak = max(measures.tensors, key=lambda t: t.peaks[i], default=None)
    if peak is not None and result == "F16" and peak.peaks[i] > LARGEST_HALF:
        yield Finding(
            "overflow", ref, f"{peak.name} has {peak.peaks[i]:.3g}, and the recipe stores the result in float16"
        )


def _descent(refs: Sequence[str], i: int, measures: Measures, candidates: range) -> Iterator[Finding]:
    gram, typical = measures.gram, measures.typical_cosine(i)
    distances = {c: gram[i, i] + gram[c, c] - 2 * gram[i, c] for c in candidates}
    nearest = min(distances, key=lambda c: distances[c], default=None)
    if nearest is not None and distances[nearest] < 0.8**2 * gram[i, i]:
        share = math.sqrt(max(distances[nearest], 0) / gram[i, i])
        yield Finding(
            "wrong base", refs[i], f"it is nearer to {refs[nearest]}, {share:.2f} times as far as to the base"
        )
    elif typical < CHILD:
        yield Finding("wrong base", refs[i], f"the cosine of its matrices with the base's is {typical:.2f}")
    elif typical < NEAR:
        yield Finding("far from base", refs[i], f"the cosine of its matrices with the base's is {typical:.2f}")


def _zeroed(i: int, measures: Measures) -> list[str]:
    """The tensors of an expert whose elements are all 0, where the base's are not."""
    whole = (t for t in measures.tensors if not t.nans[i] and not t.infinities[i])
    return [t.name for t in whole if t.peaks[i] == 0 < t.peaks[0]]


def _odd(i: int, measures: Measures) -> list[TensorMeasures]:
    """The tensors that were replaced or rescaled, not fine-tuned; none, if the whole model is far from the base."""
    if measures.typical_cosine(i) < NEAR:
        return []
    odd = {t.name: t for t in odd_tensors(measures, i) if t.cosine(i) < DISTANT}
    odd |= {t.name: t for t in measures.tensors if not 0.5 <= t.scale(i) <= 2}
    return [t for t in odd.values() if math.isfinite(t.scale(i))]


def _norms(ref: str, i: int, odd: Sequence[TensorMeasures]) -> Iterator[Finding]:
    if odd:
        facts = f"norm {odd[0].scale(i):.2g} times the base's, cosine {odd[0].cosine(i):.2f}"
        yield Finding("norms", ref, f"{_named([t.name for t in odd])}: {facts}" + (" (the first)" if odd[1:] else ""))


def _amount(ref: str, size: float, others: Sequence[float], dtype: str, base: str) -> Iterator[Finding]:
    """Yield findings from the size of a task vector, compared with the other experts' sizes.

    Args:
        ref: reference of the expert.
        size: relative norm of its task vector, without tensors that have findings already.
        others: the sizes of the other experts.
        dtype, base: the dtypes in which the expert and the base are stored.
    """
    usual = median(others) if others else 0.0
    rounding = ROUNDING.get(dtype, 0.0) if dtype != base else 0.0
    if not size:
        yield Finding("undertrained", ref, "its weights are the base's")
    elif size < NOTHING:
        yield Finding("undertrained", ref, f"its task vector has {size:.2g} of the base's norm")
    elif size < rounding:
        yield Finding("undertrained", ref, f"it differs from the base only as rounding to {dtype} does")
    elif len(others) > 1 and size < FEW * usual:  # of two experts either may be the odd one
        yield Finding("undertrained", ref, f"its task vector has {size / usual:.2g} of the other experts' norm")
    elif others and size > MANY * usual:
        yield Finding("outsized", ref, f"its task vector has {size / usual:.3g} times the other experts' norm")


def _coarse(ref: str, i: int, measures: Measures) -> Iterator[Finding]:
    changed = [t for t in measures.matrices() if t.distinct[0] and t.distinct[i] and t.unchanged[i - 1] < t.elements]
    shares = {t.name: t.distinct[i] / t.distinct[0] for t in changed if t.peaks[i]}
    coarse = [t for t in changed if shares.get(t.name, 1.0) < COARSE]
    if coarse and sum(t.elements for t in coarse) > COARSE_PART * sum(t.elements for t in measures.matrices()):
        usual = median(shares[t.name] for t in coarse)
        yield Finding(
            "quantised",
            ref,
            f"in a row of {len(coarse)} of its {len(measures.matrices())} matrices it has {usual:.2f} times as many "
            "different values as the base",
        )


def _pair(
    refs: Sequence[str], i: int, j: int, measures: Measures, differ: Callable[[int, int], bool]
) -> Iterator[Finding]:
    gram = measures.gram
    shorter = min(gram[i, i], gram[j, j])
    apart = max(gram[i, i] + gram[j, j] - 2 * gram[i, j], 0.0)
    if not shorter:
        return
    cosine = measures.between(i, j)
    if apart < ALIKE**2 * shorter and not differ(i, j):
        yield Finding("expert twice", refs[j], f"its weights are those of {refs[i]}")
    elif apart < SHARED**2 * shorter:
        yield Finding("shared origin", refs[j], f"its task vector has cosine {cosine:.2f} with that of {refs[i]}")
    elif cosine < AGAINST:
        yield Finding("opposed", refs[j], f"its task vector has cosine {cosine:.2f} with that of {refs[i]}")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
