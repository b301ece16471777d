"""How long a merge takes and how much memory it needs: a part of it is done as a sample, then thrown away.

Time grows with the elements. So does the memory of a method's own function, which takes a tensor as a whole, and that
of a LoRA expert, whose weights are computed: there the largest tensor decides. The compiled loops need as much for any.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass

from lewis import store
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.merge.in_torch import PIECE, is_computed, is_whole
from lewis.merge.run import Merge
from lewis.methods import find
from lewis.models.writer import CheckpointWriter

_WARM_UP = 1 << 20  # elements before the first sample: what is done first is slow
_FIRST = 1 << 22  # elements of the first sample; each further one is four times as large
_ENOUGH = 0.3  # seconds that the last sample takes at least


@dataclass(frozen=True)
class Forecast:
    """What a merge will take.

    Attributes:
        seconds: wall time, without the start of the process, on a machine as busy as it is now.
        memory: bytes of anonymous memory at the peak.
    """

    seconds: float
    memory: int


def forecast(merge: Merge) -> Forecast:
    """Do parts of a merge until one has taken long enough to tell.

    Raises:
        LewisError: as the merge.
    """
    elements = {name: merge.base.tensors[name].elements for name in merge.layout}
    order = sorted(elements, key=lambda name: -elements[name])
    begun = time.perf_counter()
    _run(merge, order[-1:])
    loading = time.perf_counter() - begun  # of code that the first tensor has to wait for
    whole, limit = [name for name in order if _is_whole(merge, name)], _FIRST
    before = anonymous_bytes()
    _run(merge, _part(order, elements, _WARM_UP))
    while True:
        part = _part(order, elements, limit)
        sample = [name for name in part if name in whole] or whole[-1:]
        part += [name for name in sample if name not in part]
        begun = time.perf_counter()
        with PeakMemory() as memory:
            _run(merge, part)
        took = time.perf_counter() - begun
        if took >= _ENOUGH or limit >= merge.elements:
            break
        limit *= 4
    done, growth = sum(elements[name] for name in part), 1.0
    if whole:
        largest, tried = (sum(elements[name] for name in names[: merge.threads]) for names in (whole, sample))
        growth = max(min(largest, merge.room.size) / max(tried, 1), 1)
    return Forecast(loading + took * merge.elements / max(done, 1), int(before + growth * (memory.peak - before)))


def without_models(method: str, largest: int, experts: int) -> int:
    """Bytes that a merge needs whose models are not here yet, by the elements of its largest tensor."""
    from lewis.merge.compiled import METHODS

    if method in METHODS or find(method).coefficients:
        return 130_000_000
    by_rows = find(method).elementwise or find(method).by_rows
    # The base, and of each expert its weights and task vector, then a few temporaries, in fp32.
    return 400_000_000 + (PIECE if by_rows else largest) * 4 * (4 + 4 * experts)


def _part(order: list[str], elements: dict[str, int], limit: int) -> list[str]:
    """The largest tensors that together have at most `limit` elements; at least one."""
    part, left = [], limit
    for name in order:
        if elements[name] <= left:
            part.append(name)
            left -= elements[name]
    return part or order[-1:]


def _run(merge: Merge, names: Iterable[str]) -> None:
    folder = store.beside(store.home() / "forecast")
    folder.mkdir(parents=True)
    try:
        with CheckpointWriter(folder, {name: merge.layout[name] for name in names}, merge.size + 1) as writer:
            merge.write_tensors(writer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_whole(merge: Merge, name: str) -> bool:
    """Whether a tensor is whole in memory while it is merged."""
    from lewis.merge.compiled import takes

    if name in merge.excluded or not merge.base.tensors[name].floating:
        return False
    return is_computed(merge, name) or (is_whole(merge, name) and not (merge.device == "cpu" and takes(merge, name)))
