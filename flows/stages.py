"""The stages that the flows `merge` and `search` begin with: fetch the models, measure them, allocate densities."""

from typing import Any, NamedTuple

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from lewis.allocation.step import AllocationEntry
from lewis.importance.step import CalibrationEntry, ImportanceEntry, wanted_measurements
from lewis.models.source import ModelFiles, Source
from lewis.recipe.recipe import Recipe
from lewis_flows.submit import submit
from lewis_tasks.allocate import allocate
from lewis_tasks.download import download
from lewis_tasks.importance import calibrate, measuring
from lewis_tasks.inspect import inspect, preflight
from lewis_tasks.report import report_densities
from lewis_tasks.resolve import resolve


class Models(NamedTuple):
    """Futures of the models of a recipe; `base` and `base_source` are None if the recipe has no base."""

    base_source: PrefectFuture[Source] | None
    sources: list[PrefectFuture[Source]]
    checked: PrefectFuture[None]
    base: PrefectFuture[ModelFiles] | None
    experts: list[PrefectFuture[ModelFiles]]
    inspected: PrefectFuture[int]

    @property
    def futures(self) -> list[PrefectFuture[Any] | None]:
        """All of them, each before those that fail if it fails."""
        return [self.base_source, *self.sources, self.checked, self.base, *self.experts, self.inspected]


class Guide(NamedTuple):
    """Futures of the calibration sets, importance and densities of a recipe; all empty for a plain merge.

    Attributes:
        sets: the calibration sets.
        measured: importance of base and experts, or the statistics of the experts that a method fits to.
        allocated: the densities.
        drawn: ends when the UI shows the densities.
    """

    sets: list[PrefectFuture[CalibrationEntry]]
    measured: list[PrefectFuture[list[ImportanceEntry]]]
    allocated: PrefectFuture[AllocationEntry] | None
    drawn: PrefectFuture[None] | None


def fetch(plan: Recipe, tasks_digest: PrefectFuture[str] | None) -> Models:
    """Resolve base and experts, check them from their headers, download and inspect them.

    Args:
        plan: the recipe.
        tasks_digest: nothing is downloaded before it is there: if a task does not exist, the run fails early.
    """
    base_source = submit(resolve, quote(plan), plan.base_model) if plan.base_model else None
    sources = list[PrefectFuture[Source]]()
    for entry in plan.experts:  # without a base, models are read under the names of the first
        first = sources[0] if sources and base_source is None else None
        sources.append(submit(resolve, quote(plan), entry.model, base_source, first))
    checked = submit(preflight, quote(plan), base_source, sources)
    ready = [future for future in (tasks_digest, checked) if future]
    base = submit(download, base_source, wait_for=ready) if base_source else None
    experts = [submit(download, source, wait_for=ready) for source in sources]
    return Models(base_source, sources, checked, base, experts, submit(inspect, quote(plan), base, experts))


def guide(
    plan: Recipe,
    base: PrefectFuture[ModelFiles] | None,
    experts: list[PrefectFuture[ModelFiles]],
    inspected: PrefectFuture[int],
) -> Guide:
    """Measure the importance of base and experts, then allocate the densities; does nothing for a plain merge.

    Each model is measured in a task of its own, in one pass over all its calibration sets. A method that fits has no
    densities but those that guide its anchor. Where it fits to statistics of the experts, these are what is measured;
    in forward order it needs the sets only: its merge sends all models through them side by side, and anew when one of
    the models has moved.
    """
    if plan.lewis is None or base is None:
        return Guide([], [], None, None)
    files = {entry.model: each for entry, each in zip(plan.experts, experts, strict=True)}
    wanted = wanted_measurements(plan)
    names = [name for _, names in wanted for name in names]
    names += [plan.calibration_of(entry) for entry in plan.experts] if plan.fits else []
    sets = {name: submit(calibrate, quote(plan), name, base, wait_for=[inspected]) for name in dict.fromkeys(names)}
    settings = plan.lewis.importance.model_dump(exclude={"metric"})
    measured = [
        submit(
            measuring(entry.model if entry else str(plan.base_model)),
            files[entry.model] if entry else base,
            [sets[name] for name in names],
            settings,
            plan.needs_grams and entry is not None,
        )
        for entry, names in wanted
    ]
    if plan.allocator is None:
        return Guide(list(sets.values()), measured, None, None)
    allocated = submit(allocate, quote(plan), plan.blocks, base, experts, measured, wait_for=[inspected])
    drawn = submit(report_densities, quote(plan), measured, allocated)
    return Guide(list(sets.values()), measured, allocated, drawn)
