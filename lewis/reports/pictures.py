"""The pictures of a merge. Each is drawn once and then found in the store, since many places show the same."""

from collections.abc import Callable, Mapping
from typing import Any

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.evaluation.scored import Scored, intervals, scores_of
from lewis.evaluation.step import ScoresEntry
from lewis.reports import charts
from lewis.store import kinds, remote
from lewis.store.png import is_whole

SEMANTICS = "2"  # raise it when the same numbers would be drawn in another way


def densities(allocated: AllocationEntry) -> bytes:
    """`charts.density_heat_map` of an allocation; a PNG file."""

    def draw() -> bytes:
        shown = {ref: each.densities for ref, each in allocated.experts().items()}
        return charts.density_heat_map(shown, allocated.means)

    return _kept(["densities", allocated.digest], draw)


def scores(weights: Mapping[str, float], found: Mapping[str, ScoresEntry]) -> bytes:
    """`charts.score_bars` of what was scored, with 95 % intervals; a PNG file.

    Args:
        weights: `evaluate.weights` of the recipe; empty: there is no weighted mean.
        found: label -> scores, in the order of the bars.
    """

    def draw() -> bytes:
        models = [Scored.of(label, each.content("model"), each.evaluated, weights) for label, each in found.items()]
        return charts.score_bars(scores_of(models), intervals(models))

    return _kept(["scores", [[label, entry.digest] for label, entry in found.items()], dict(weights)], draw)


def _kept(shown: list[Any], draw: Callable[[], bytes]) -> bytes:
    path = kinds.PICTURES.path(store.digest([SEMANTICS, *shown]))
    store.mark_used(path)
    remote.fetch(path)
    found = path.read_bytes() if path.is_file() else None
    if found is not None and not is_whole(found):
        store.set_aside([path], "its checksums do not fit")
        found = None
    if found is None:
        found = draw()
        store.write_bytes(path, found)
        remote.push(path)
    return found
