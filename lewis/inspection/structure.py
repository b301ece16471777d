"""Find weights of an expert that are in another place than in the base: swapped layers, permuted heads or rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lewis.inspection.measures import Measures, TensorMeasures, has, weights
from lewis.models.model import Model

SAME = 0.5  # cosine from which on two layers or rows count as the same one, fine-tuned
_SAMPLE = 1 << 16  # elements of each layer that layers are compared by
_MOST = 12  # tensors of an expert that are searched for permuted rows
_ROWS = 64  # rows of a tensor that are looked for among the base's
_NUMBER = re.compile(r"(?:^|\.)\d+\.")
_ATTENTION = re.compile(r"attn|attention")


def moved_parts(base: Model, expert: Model, number: int, measures: Measures) -> list[dict[str, Any]]:
    """Find parts of an expert that are the base's in another place, such as swapped layers, or that are lost.

    Args:
        base, expert: the opened models.
        number: the expert's number in the measures.
        measures: measures of all weights, which tell the odd tensors.

    Returns:
        For each finding its `kind` (`swapped layers`, `zeroed tensor`, `permuted heads` or `permuted rows`), `what` in
        words, and the names of the `tensors`; plain JSON data.
    """
    odd = odd_tensors(measures, number)
    swapped = _swapped_layers(base, expert, odd, measures)
    moved = {name for each in swapped for name in each["tensors"]}
    left = [each.name for each in odd if each.name not in moved][:_MOST]
    emptied = [found for name in left if (found := _zero_rows(base, expert, name))]
    moved = {name for each in emptied for name in each["tensors"]}
    left = [name for name in left if name not in moved and len(base.tensors[name].shape) == 2]
    return [*swapped, *emptied, *(found for name in left if (found := _permuted(base, expert, name)))]


def _zero_rows(base: Model, expert: Model, name: str) -> dict[str, Any] | None:
    """Return a finding if rows of a matrix are all 0 that are not 0 in the base; else None.

    The program that wrote the expert has then left out a part of the matrix, or some of the experts stacked in it.
    """
    ours, theirs = (values.reshape(-1, values.shape[-1]) for values in (weights(base, name), weights(expert, name)))
    lost = int((~theirs.any(axis=1) & ours.any(axis=1)).sum())
    if not lost:
        return None
    return {"kind": "zeroed tensor", "what": f"{name}: {lost} of its {len(ours)} rows are 0", "tensors": [name]}


def odd_tensors(measures: Measures, number: int) -> list[TensorMeasures]:
    """Return an expert's matrices whose direction differs much more from the base's than for most of its matrices."""
    cosines = {each.name: each.cosine(number) for each in measures.matrices()}
    limit = min(0.02 + 10 * (1 - measures.typical_cosine(number)), 0.8)
    return [each for each in measures.matrices() if 1 - cosines[each.name] > limit]


def _swapped_layers(
    base: Model, expert: Model, odd: Sequence[TensorMeasures], measures: Measures
) -> list[dict[str, Any]]:
    """Find swapped layers within each stack of layers by itself: a model may have two towers."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for each in measures.matrices():
        match = _NUMBER.search(each.name)
        if match and each.layer is not None and has(expert, each.name, base.tensors[each.name].shape):
            stacks.setdefault(each.name[: match.start()], {}).setdefault(each.layer, []).append(each.name)
    names = {each.name for each in odd}
    return [found for stack in stacks.values() for found in _swapped_in_stack(base, expert, names, stack)]


def _swapped_in_stack(
    base: Model, expert: Model, odd: Collection[str], every: Mapping[int, list[str]]
) -> list[dict[str, Any]]:
    """Find layers in a stack that are other layers of the base's; layers with odd matrices are compared with all."""
    suspects = [layer for layer, own in every.items() if sum(name in odd for name in own) > len(own) / 2]
    if not suspects or len(every) < 2:
        return []
    chosen = {layer: min(own, key=lambda name: (len(name), name)) for layer, own in every.items()}
    kind = _NUMBER.sub(".", chosen[suspects[0]], count=1)  # only tensors of one kind can be compared
    chosen = {layer: name for layer, name in chosen.items() if _NUMBER.sub(".", name, count=1) == kind}
    ours = {layer: _sample(base, name) for layer, name in chosen.items()}
    source: dict[int, int] = {}
    for layer in (layer for layer in suspects if layer in chosen):
        theirs = _sample(expert, chosen[layer])
        alike = {place: float(theirs @ sample) for place, sample in ours.items() if sample.size == theirs.size}
        best = max(alike, key=lambda place: alike[place])
        if best != layer and alike[best] > SAME:
            source[layer] = best
    if not source:
        return []
    found = [f"its layer {layer} is the base's layer {place}" for layer, place in list(source.items())[:4]]
    more = f", and {len(source) - 4} layers more" if len(source) > 4 else ""
    tensors = [name for layer in source for name in every[layer]]
    return [{"kind": "swapped layers", "what": ", ".join(found) + more, "tensors": tensors}]


def _sample(model: Model, name: str) -> np.ndarray:
    values = weights(model, name).reshape(-1)[:_SAMPLE]
    return _unit(values[None])[0]


def _permuted(base: Model, expert: Model, name: str) -> dict[str, Any] | None:
    ours, theirs = weights(base, name), weights(expert, name)
    for what, one, other in (("rows", ours, theirs), ("columns", ours.T, theirs.T)):
        moves = _moves(one, other)
        if moves:
            head = _head_size(base)
            by_heads = head > 0 and bool(_ATTENTION.search(name)) and all((a - b) % head == 0 for a, b in moves)
            row, place = moves[0]
            moved = f"head {row // head} is the base's head {place // head}" if by_heads else ""
            moved = moved or f"{what[:-1]} {row} is the base's {what[:-1]} {place}"
            kind = "permuted heads" if by_heads else "permuted rows"
            return {"kind": kind, "what": f"{name}: {moved}", "tensors": [name]}
    return None


def _moves(ours: np.ndarray, theirs: np.ndarray) -> list[tuple[int, int]]:
    """(row, row of the base) for rows that are found elsewhere in the base; empty unless most of the odd rows are."""
    ours, theirs = _unit(ours), _unit(theirs)
    odd = np.flatnonzero(np.einsum("ij,ij->i", ours, theirs) < SAME)
    if not len(odd):
        return []
    odd = odd[np.linspace(0, len(odd) - 1, min(len(odd), _ROWS)).astype(np.int64)]
    alike = theirs[odd] @ ours.T
    best = alike.argmax(axis=1)
    found = [
        (int(row), int(place))
        for row, place, cosine in zip(odd, best, alike.max(axis=1), strict=True)
        if cosine > max(SAME, 6 / np.sqrt(ours.shape[1])) and row != place
    ]
    return found if len(found) > 0.8 * len(odd) else []


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: np.ndarray = np.nan_to_num(rows / np.where(norms > 0, norms, 1), posinf=0, neginf=0)
    return scaled


def _head_size(model: Model) -> int:
    """Return the rows of one attention head in a projection; 0 if the config gives none, or one for each layer."""
    config = model.config.get("text_config") or model.config
    heads = config.get("num_attention_heads") or config.get("n_head") or 0
    width = config.get("hidden_size") or config.get("n_embd") or 0
    size = config.get("head_dim") or 0
    if not all(isinstance(each, int) for each in (heads, width, size)):
        return 0
    return size or (width // heads if heads else 0)
