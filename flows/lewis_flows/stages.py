"""The stages that the flows `merge` and `search` begin with: fetch the models, measure them, allocate densities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from lewis.allocation.step import AllocationEntry
from lewis.importance.step import CalibrationEntry, ImportanceEntry, wanted_measurements
from lewis.models.source import ModelFiles, Source
from lewis.recipe.recipe import Recipe
from lewis_flows.submit import finish, known, submit
from lewis_tasks.allocate import allocate
from lewis_tasks.download import download
from lewis_tasks.importance import calibrate, measuring
from lewis_tasks.inspect import inspect, preflight
from lewis_tasks.report import report_densities
from lewis_tasks.resolve import resolve


class Pinned(NamedTuple):
    """What `pin` found out.

    Attributes:
        base: None if the recipe has none.
        experts: in the recipe's order.
        checked: has ended, and let them pass.
    """

    base: PrefectFuture[Source] | None
    experts: list[PrefectFuture[Source]]
    checked: PrefectFuture[None]


class Models(NamedTuple):
    """Futures, all of them finished, of the models of a recipe on disk; `base` is None if the recipe has none."""

    base: PrefectFuture[ModelFiles] | None
    experts: list[PrefectFuture[ModelFiles]]
    inspected: PrefectFuture[int]


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


# Who waits in the flow for what a task needs, and gives it quoted (`known`), draws no edge. So each stage has edges
# from the one before it alone, and the graph of a run reads from left to right.


def pin(plan: Recipe, checks: Sequence[PrefectFuture[Any] | None]) -> Pinned:
    """Resolve base and experts, and check from their headers that they fit together.

    Args:
        plan: the recipe.
        checks: nothing is looked at before they have ended: if a task does not exist, the run fails early.

    Raises:
        LewisError: if a check fails, or a model does not exist or does not fit.
    """
    base = submit(resolve, quote(plan), plan.base_model) if plan.base_model else None
    finish(base)
    experts = list[PrefectFuture[Source]]()
    for entry in plan.experts:  # without a base, models are read under the names of the first
        first = experts[0] if experts and base is None else None
        experts.append(submit(resolve, quote(plan), entry.model, known(base), first))
    checked = submit(preflight, quote(plan), base, experts, wait_for=[each for each in checks if each])
    finish(*checks, *experts, checked)
    return Pinned(base, experts, checked)


def fetch(plan: Recipe, pinned: Pinned) -> Models:
    """Download and inspect the models.

    Raises:
        LewisError: as the first task that fails.
    """
    before = [pinned.checked]
    base = submit(download, known(pinned.base), wait_for=before) if pinned.base else None
    experts = [submit(download, known(source), wait_for=before) for source in pinned.experts]
    inspected = submit(inspect, quote(plan), base, experts)
    finish(base, *experts, inspected)
    return Models(base, experts, inspected)


def guide(plan: Recipe, models: Models) -> Guide:
    """Measure the importance of base and experts, then allocate the densities; does nothing for a plain merge.

    Each model is measured in a task of its own, in one pass over all its calibration sets. A method that fits has no
    densities but those that guide its anchor. Where it fits to statistics of the experts, these are what is measured;
    in forward order it needs the sets only: its merge sends all models through them side by side, and anew when one of
    the models has moved.
    """
    if plan.lewis is None or models.base is None:
        return Guide([], [], None, None)
    base, experts = known(models.base), known(models.experts)
    files = {entry.model: known(each) for entry, each in zip(plan.experts, models.experts, strict=True)}
    wanted = wanted_measurements(plan)
    names = [name for _, names in wanted for name in names]
    names += [plan.calibration_of(entry) for entry in plan.experts] if plan.fits else []
    after = [models.inspected]
    sets = {name: submit(calibrate, quote(plan), name, base, wait_for=after) for name in dict.fromkeys(names)}
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
    allocated = submit(allocate, quote(plan), plan.blocks, base, experts, measured, wait_for=[] if measured else after)
    finish(*sets.values(), *measured, allocated)
    drawn = submit(report_densities, quote(plan), known(measured), allocated)
    return Guide(list(sets.values()), measured, allocated, drawn)
