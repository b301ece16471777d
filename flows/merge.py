"""The DAG: from a recipe to a scored, registered and, if it is better, promoted merged model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel

from lewis import pipeline
from lewis.pipeline import ModelFiles
from lewis.recipe import Recipe
from tasks.allocate import allocate
from tasks.download import download
from tasks.evaluate import check_tasks, evaluate
from tasks.importance import calibrate, measure
from tasks.inspect import inspect, preflight
from tasks.merge import merge
from tasks.register import find_champion, gate, promote, register
from tasks.report import report_densities, report_scores
from tasks.resolve import resolve


class MergeReport(BaseModel):
    """What a run of the DAG gives back.

    Attributes:
        digest, folder: the merged checkpoint in the store.
        mean_density: expert -> parameter-weighted mean density; empty for a plain merge.
        scores: rows of the score table.
        version: `models:/name/version`, if the recipe registers.
        created: whether that version is new.
        promoted: whether it is the champion now.
        verdict: the gate's reasons.
    """

    recipe: str
    digest: str
    folder: Path
    mean_density: dict[str, float] = {}
    scores: list[dict[str, Any]] = []
    version: str | None = None
    created: bool = False
    promoted: bool = False
    verdict: list[str] = []


def _run_name() -> str:
    return f"merge {Path(str(flow_run.parameters['recipe'])).stem}"


@flow(name="merge", flow_run_name=_run_name, task_runner=ThreadPoolTaskRunner(max_workers=8))
def merge_flow(recipe: str, overrides: Sequence[str] = ()) -> MergeReport:
    """Resolve, download, measure, allocate, merge, evaluate, gate, register, promote.

    Args:
        recipe: path of the recipe, a YAML file.
        overrides: `key.path=value` each, as `lewis run --set`.
    """
    plan = Recipe.load(recipe, list(overrides))
    settings = pipeline.eval_settings(plan) if plan.evaluate else None
    tasks_digest = check_tasks.submit(settings, plan.root) if settings else None
    champion = find_champion.submit(plan.register_as.name) if plan.register_as else None

    base_source = resolve.submit(plan, plan.base_model) if plan.base_model else None
    sources = [resolve.submit(plan, entry.model, base_source) for entry in plan.experts]
    started = _given(tasks_digest, champion, base_source, *sources, preflight.submit(plan, base_source, sources))

    base = download.submit(base_source, wait_for=started) if base_source else None
    experts = [download.submit(source, wait_for=started) for source in sources]
    inspected = inspect.submit(plan, base, experts)

    sets, measured, allocated, heat_map = _guide(plan, base, experts, inspected)
    merged = merge.submit(plan, plan.blocks, base, experts, allocated, wait_for=[inspected])
    _finish(*started, *_given(base), *experts, inspected, *sets, *measured, *_given(allocated, heat_map), merged)

    scores: dict[str, PrefectFuture[Any]] = {}
    if settings:
        models = _models_to_score(plan, base, experts, allocated, merged)
        if champion and (current := champion.result()) and current.folder and current.digest != merged.result().digest:
            models["champion"] = ModelFiles.at("champion", current.digest, current.folder)
        scores = {
            label: evaluate.submit(model, label, settings, plan.root, tasks_digest) for label, model in models.items()
        }
        table = report_scores.submit(plan, scores)
        _finish(*scores.values(), table)

    result = merged.result()
    report = MergeReport(recipe=plan.name, digest=result.digest, folder=result.folder)
    if allocated:
        report.mean_density = allocated.result().means
    if scores:
        report.scores = table.result()
    if plan.register_as:
        verdict = gate.submit(plan, champion, merged, scores)
        version = register.submit(plan, base, experts, sets, allocated, merged, scores, wait_for=[verdict])
        promoted = promote.submit(plan, version, verdict)
        _finish(verdict, version, promoted)
        report.version, report.created = version.result().uri, version.result().created
        report.verdict, report.promoted = list(verdict.result().reasons), promoted.result()
    return report


def _guide(
    plan: Recipe, base: PrefectFuture[Any] | None, experts: list[PrefectFuture[Any]], inspected: PrefectFuture[Any]
) -> tuple[list[PrefectFuture[Any]], list[PrefectFuture[Any]], PrefectFuture[Any] | None, PrefectFuture[Any] | None]:
    """Importance of base and experts on their calibration sets, and the densities; nothing for a plain merge."""
    if plan.lewis is None or base is None:
        return [], [], None, None
    files = {entry.model: each for entry, each in zip(plan.experts, experts, strict=True)}
    wanted = pipeline.wanted_measurements(plan)
    sets = {
        name: calibrate.submit(plan, name, base, wait_for=[inspected]) for name in dict.fromkeys(n for _, n in wanted)
    }
    measured = [measure.submit(files[entry.model] if entry else base, sets[name]) for entry, name in wanted]
    allocated = allocate.submit(plan, plan.blocks, base, experts, measured, wait_for=[inspected])
    return list(sets.values()), measured, allocated, report_densities.submit(plan, measured, allocated)


def _models_to_score(
    plan: Recipe,
    base: PrefectFuture[Any] | None,
    experts: list[PrefectFuture[Any]],
    allocated: PrefectFuture[Any] | None,
    merged: PrefectFuture[Any],
) -> dict[str, Any]:
    """Label -> model, in the order of the table: the parents, the uniform baseline, the merged model."""
    assert plan.evaluate is not None
    models: dict[str, Any] = {}
    if base and "base" in plan.evaluate.baselines:
        models["base"] = base
    if "experts" in plan.evaluate.baselines:
        pairs = zip(pipeline.short_names([e.model for e in plan.experts]), plan.experts, experts, strict=True)
        models |= {label: files for label, entry, files in pairs if entry.model != plan.base_model}
    if allocated and plan.guided and "uniform" in plan.evaluate.baselines:
        models["uniform"] = merge.submit(plan, plan.blocks, base, experts, allocated, "uniform", wait_for=[merged])
    return {**models, plan.label: merged}


def _given(*futures: PrefectFuture[Any] | None) -> list[PrefectFuture[Any]]:
    return [future for future in futures if future is not None]


def _finish(*futures: PrefectFuture[Any]) -> None:
    """Wait for all; raise what the first one in this order raised, so that the cause comes before what it broke."""
    wait(list(futures))
    for future in futures:
        future.result()
