"""The pictures of a merge. Each is drawn once and then found in the store, since many places show the same."""

from collections.abc import Callable, Mapping
from typing import Any

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.evaluation.statistics.scored import intervals, scores_of
from lewis.evaluation.step import ScoresEntry, scored
from lewis.recipe.recipe import Recipe
from lewis.reports import charts
from lewis.store import kinds, remote
from lewis.store.sealed_json import DamagedError

SEMANTICS = "2"  # raise it when the same numbers would be drawn in another way


def densities(allocated: AllocationEntry) -> bytes:
    """`charts.density_heat_map` of an allocation; a PNG file."""

    def draw() -> bytes:
        shown = {ref: each.densities for ref, each in allocated.experts().items()}
        return charts.density_heat_map(shown, allocated.means)

    return _kept(["densities", allocated.digest], draw)


def scores(recipe: Recipe, found: Mapping[str, ScoresEntry]) -> bytes:
    """`charts.score_bars` of what was scored, with 95 % intervals; a PNG file.

    Args:
        found: label -> scores, in the order of the bars.
    """

    def draw() -> bytes:
        models = scored(recipe.score_weights, found)
        return charts.score_bars(scores_of(models), intervals(models))

    return _kept(
        ["scores", [[label, entry.digest] for label, entry in found.items()], dict(recipe.score_weights)], draw
    )


def _kept(shown: list[Any], draw: Callable[[], bytes]) -> bytes:
    path = kinds.PICTURES.path(store.digest([SEMANTICS, *shown]))
    store.mark_used(path)
    remote.fetch(path)
    found = path.read_bytes() if path.is_file() else None
    if found is not None:
        try:
            kinds.check_png(found)
        except DamagedError as error:
            store.set_aside([path], str(error))
            found = None
    if found is None:
        found = draw()
        store.write_bytes(path, found)
        remote.push(path)
    return found
