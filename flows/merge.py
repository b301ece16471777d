"""The DAG: from a recipe to a scored, registered and, if it is better, promoted merged model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote
from pydantic import BaseModel

from lewis import pipeline
from lewis.entries import ModelFiles
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
    # The recipe goes to the tasks quoted: Prefect would take the names in it for results of the tasks that return them,
    # and draw edges from everywhere to everywhere.
    plan = Recipe.load(recipe, list(overrides))
    settings = pipeline.eval_settings(plan) if plan.evaluate else None
    tasks_digest = check_tasks.submit(settings, plan.root) if settings else None
    champion = find_champion.submit(plan.register_as.name) if plan.register_as else None

    base_source = resolve.submit(quote(plan), plan.base_model) if plan.base_model else None
    sources = [resolve.submit(quote(plan), entry.model, base_source) for entry in plan.experts]
    checked = preflight.submit(quote(plan), base_source, sources)

    ready = [future for future in (tasks_digest, checked) if future]
    base = download.submit(base_source, wait_for=ready) if base_source else None
    experts = [download.submit(source, wait_for=ready) for source in sources]
    inspected = inspect.submit(quote(plan), base, experts)

    sets, measured, allocated, drawn = _guide(plan, base, experts, inspected)
    merged = merge.submit(quote(plan), plan.blocks, base, experts, allocated, wait_for=[inspected])
    uniform = None
    if allocated and plan.wants_uniform:
        uniform = merge.submit(quote(plan), plan.blocks, base, experts, allocated, "uniform", wait_for=[merged])
    _finish(tasks_digest, champion, base_source, *sources, checked, base, *experts, inspected)
    _finish(*sets, *measured, allocated, drawn, merged, uniform)
    result = merged.result()
    report = MergeReport(recipe=plan.name, digest=result.digest, folder=result.folder)
    report.mean_density = allocated.result().means if allocated else {}

    scores: dict[str, PrefectFuture[Any]] = {}
    if settings:
        models = _models_to_score(plan, base, experts, uniform, merged)
        current = champion.result() if champion else None
        if current and current.folder and current.digest != result.digest:
            models["champion"] = ModelFiles.at("champion", current.digest, current.folder)
        for label, model in models.items():
            scores[label] = evaluate.submit(model, label, settings, plan.root, tasks_digest)
        table = report_scores.submit(quote(plan), scores)
        _finish(*scores.values(), table)
        report.scores = table.result()

    if plan.register_as:
        verdict = gate.submit(quote(plan), champion, merged, scores)
        version = register.submit(quote(plan), base, experts, sets, allocated, merged, scores, wait_for=[verdict])
        promoted = promote.submit(quote(plan), version, verdict)
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
        name: calibrate.submit(quote(plan), name, base, wait_for=[inspected])
        for name in dict.fromkeys(n for _, n in wanted)
    }
    measured = [measure.submit(files[entry.model] if entry else base, sets[name]) for entry, name in wanted]
    allocated = allocate.submit(quote(plan), plan.blocks, base, experts, measured, wait_for=[inspected])
    return list(sets.values()), measured, allocated, report_densities.submit(quote(plan), measured, allocated)


def _models_to_score(
    plan: Recipe,
    base: PrefectFuture[Any] | None,
    experts: list[PrefectFuture[Any]],
    uniform: PrefectFuture[Any] | None,
    merged: PrefectFuture[Any],
) -> dict[str, Any]:
    """Label -> model, in the order of the table: the parents, the uniform baseline, the merged model."""
    assert plan.evaluate is not None
    models: dict[str, Any] = {}
    gated = plan.register_as is not None and plan.register_as.gate is not None
    if base and ("base" in plan.evaluate.baselines or gated):  # the first champion has to beat the base
        models["base"] = base
    if "experts" in plan.evaluate.baselines:
        pairs = zip(pipeline.short_names([e.model for e in plan.experts]), plan.experts, experts, strict=True)
        models |= {label: files for label, entry, files in pairs if entry.model != plan.base_model}
    return {**models, **({"uniform": uniform} if uniform else {}), plan.label: merged}


def _finish(*futures: PrefectFuture[Any] | None) -> None:
    """Wait for all; raise what the first one in this order raised, so that the cause comes before what it broke."""
    given = [future for future in futures if future is not None]
    wait(given)
    for future in given:
        future.result()
