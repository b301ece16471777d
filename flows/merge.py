"""The DAG: from a recipe to a scored, registered and, if it is better, promoted merged model."""

from pathlib import Path
from typing import Any, NamedTuple

from prefect import State, flow
from prefect.futures import PrefectFuture, wait
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from prefect.utilities.annotations import quote
from pydantic import BaseModel

from lewis.evaluation.step import eval_settings
from lewis.importance.step import wanted_measurements
from lewis.models.source import ModelFiles, short_names
from lewis.recipe.recipe import Recipe
from lewis_flows import prefect_runs, recipes_folder
from lewis_flows.runners import choose
from lewis_flows.turn import turn
from lewis_tasks.allocate import allocate
from lewis_tasks.download import download
from lewis_tasks.evaluate import check_tasks, evaluate
from lewis_tasks.importance import calibrate, measuring
from lewis_tasks.inspect import inspect, preflight
from lewis_tasks.merge import merging
from lewis_tasks.publish import check_publish, publish
from lewis_tasks.register import find_champion, gate, promote, register
from lewis_tasks.report import name_run, report_densities, report_run, report_scores
from lewis_tasks.resolve import resolve, settle
from lewis_tasks.support.failures import result_of, says_why
from lewis_tasks.support.flow_run import tally


class MergeReport(BaseModel):
    """What a run of the DAG gives back.

    Attributes:
        digest, folder: the merged checkpoint in the store.
        mean_density: expert -> parameter-weighted mean density; empty for a plain merge.
        scores: rows of the score table.
        comparison: the merged model against each other one, document by document: gain, interval, wins, losses, p.
        version: `models:/name/version`, if the recipe registers.
        created: whether that version is new.
        promoted: whether it is the champion now.
        verdict: the gate's reasons.
        published: URL of the champion on the Hub, if the recipe publishes.
    """

    recipe: str
    digest: str
    folder: Path
    mean_density: dict[str, float] = {}
    scores: list[dict[str, str]] = []
    comparison: list[dict[str, str]] = []
    version: str | None = None
    created: bool = False
    promoted: bool = False
    verdict: list[str] = []
    published: str | None = None


def _run_name() -> str:
    return f"merge {Path(str(flow_run.parameters['recipe'])).stem}"


@flow(name=prefect_runs.MERGE, flow_run_name=_run_name, task_runner=choose.task_runner())
@says_why
def merge_flow(recipe: str, overrides: list[str] | None = None, settle_seconds: float = 0) -> State[MergeReport]:
    """Resolve, download, measure, allocate, merge, evaluate, gate, register, promote.

    Ends `Cached` if everything was found done, and `Skipped` if a run of the recipe waits for its turn already.

    Args:
        recipe: the name of a recipe in the recipes folder, or the path of a YAML file.
        overrides: `key.path=value` each, as `lewis run --set`.
        settle_seconds: how long no model may have moved before the work begins; for runs that a release starts.
    """
    choose.check()
    path = recipes_folder.find(recipe)
    with turn(path, str(flow_run.id), skip=deployment.id is not None) as ours:
        if not ours:
            return Completed(
                name="Skipped", message=f"a run of {path.stem} waits already and will find the newest state"
            )
        plan = Recipe.load(path, overrides or [])
        if settle_seconds > 0:
            settle(quote(plan), settle_seconds)
        report, changed = _merge(plan)
    if changed:
        return Completed(data=report)
    return Completed(name="Cached", message=f"{path.stem}: nothing has changed, everything was found done", data=report)


def _merge(plan: Recipe) -> tuple[MergeReport, bool]:
    """The DAG; gives its report, and whether anything was computed, registered or promoted."""
    # The recipe goes to the tasks quoted: Prefect would take the names in it for results of the tasks that return them,
    # and draw edges from everywhere to everywhere.
    settings = eval_settings(plan) if plan.evaluate else None
    tasks_digest = check_tasks.submit(settings, plan.root) if settings else None
    champion = find_champion.submit(plan.register_as.name, bool(settings)) if plan.register_as else None
    publishable = check_publish.submit(quote(plan)) if plan.publish else None

    models = fetch(plan, tasks_digest)
    base, experts, inspected = models.base, models.experts, models.inspected
    named = name_run.submit(quote(plan), models.base_source, models.sources)
    sets, measured, allocated, drawn = guide(plan, base, experts, inspected)
    merged = merging(plan).submit(quote(plan), plan.blocks, base, experts, allocated, wait_for=[inspected])
    uniform = None
    if allocated and plan.wants_uniform:
        baseline = merging(plan, "uniform")
        uniform = baseline.submit(quote(plan), plan.blocks, base, experts, allocated, "uniform", wait_for=[merged])
    finish(tasks_digest, champion, publishable, *models.futures)
    finish(*sets, *measured, allocated, drawn, merged, uniform)
    result = merged.result()
    report = MergeReport(recipe=plan.name, digest=result.digest, folder=result.folder)
    report.mean_density = allocated.result().means if allocated else {}

    scores: dict[str, PrefectFuture[Any]] = {}
    if settings:
        to_score = _models_to_score(plan, base, experts, uniform, merged)
        current = champion.result() if champion else None
        if current and current.folder and current.digest != result.digest:
            to_score["champion"] = ModelFiles.at("champion", current.digest, current.folder)
            to_score[plan.label] = to_score.pop(plan.label)  # stays the last, which the pictures outline
        for label, model in to_score.items():
            scores[label] = evaluate.submit(model, label, settings, plan.root, tasks_digest)
        table = report_scores.submit(quote(plan), scores)
        finish(*scores.values(), table)
        report.scores, report.comparison = table.result()["scores"], table.result()["comparison"]

    verdict = version = published = None
    moved = False
    inputs = [_known(each) for each in (base, experts, sets, allocated)]
    if plan.register_as:
        verdict = gate.submit(quote(plan), champion, merged, scores)
        version = register.submit(quote(plan), *inputs, merged, _known(scores), wait_for=[verdict])
        promoted = promote.submit(quote(plan), version, verdict, _known(merged))
        finish(verdict, version, promoted)
        report.version, report.created = version.result().uri, version.result().created
        report.verdict, report.promoted = list(verdict.result().reasons), promoted.result()
        before = champion.result() if champion else None
        moved = report.promoted and (before is None or before.version.uri != report.version)
        if plan.publish:
            published = publish.submit(quote(plan), version, merged, wait_for=[promoted])
            published.wait()  # what it raises comes after the report
    work = tally(
        download=[base, *experts],
        measure=measured,
        allocate=[allocated],
        merge=[merged, uniform],
        evaluate=scores.values(),
    )
    facts = [_known(each) for each in (merged, champion, scores, verdict)]
    url = published.result() if published and published.state.is_completed() else None
    told = report_run.submit(
        quote(plan), *inputs, *facts, version, work, quote(report.comparison), url, wait_for=[merged, named]
    )
    told.wait()  # and no more: a version is none the worse for a report that failed, which the UI shows as such
    if published:
        report.published = result_of(published)
    results = [base, *experts, *measured, allocated, merged, uniform, *scores.values()]
    computed = any(future.state.name != "Cached" for future in results if future)
    return report, computed or report.created or moved


class Models(NamedTuple):
    """The models of a recipe on their way here; base and its source are None if the recipe has none."""

    base_source: PrefectFuture[Any] | None
    sources: list[PrefectFuture[Any]]
    checked: PrefectFuture[Any]
    base: PrefectFuture[Any] | None
    experts: list[PrefectFuture[Any]]
    inspected: PrefectFuture[Any]

    @property
    def futures(self) -> list[PrefectFuture[Any] | None]:
        """All of them, causes before what they break."""
        return [self.base_source, *self.sources, self.checked, self.base, *self.experts, self.inspected]


def fetch(plan: Recipe, tasks_digest: PrefectFuture[Any] | None) -> Models:
    """Resolve, check from headers, download and inspect base and experts; `tasks_digest` is waited for first."""
    base_source = resolve.submit(quote(plan), plan.base_model) if plan.base_model else None
    sources = [resolve.submit(quote(plan), entry.model, base_source) for entry in plan.experts]
    checked = preflight.submit(quote(plan), base_source, sources)
    ready = [future for future in (tasks_digest, checked) if future]
    base = download.submit(base_source, wait_for=ready) if base_source else None
    experts = [download.submit(source, wait_for=ready) for source in sources]
    return Models(base_source, sources, checked, base, experts, inspect.submit(quote(plan), base, experts))


def guide(
    plan: Recipe, base: PrefectFuture[Any] | None, experts: list[PrefectFuture[Any]], inspected: PrefectFuture[Any]
) -> tuple[list[PrefectFuture[Any]], list[PrefectFuture[Any]], PrefectFuture[Any] | None, PrefectFuture[Any] | None]:
    """Importance of base and experts on their calibration sets, and the densities; nothing for a plain merge.

    Base and experts are measured in tasks of their own, each with one pass over all of its sets.
    """
    if plan.lewis is None or base is None:
        return [], [], None, None
    files = {entry.model: each for entry, each in zip(plan.experts, experts, strict=True)}
    wanted = wanted_measurements(plan)
    sets = {
        name: calibrate.submit(quote(plan), name, base, wait_for=[inspected])
        for name in dict.fromkeys(name for _, names in wanted for name in names)
    }
    settings = plan.lewis.importance.model_dump(exclude={"metric"})
    measured = [
        measuring(entry.model if entry else str(plan.base_model)).submit(
            files[entry.model] if entry else base, [sets[name] for name in names], settings
        )
        for entry, names in wanted
    ]
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
    models: dict[str, Any] = {"base": base} if plan.scores_base else {}
    if plan.scores_experts:
        pairs = zip(short_names([e.model for e in plan.experts]), plan.experts, experts, strict=True)
        models |= {label: files for label, entry, files in pairs if entry.model != plan.base_model}
    return {**models, **({"uniform": uniform} if uniform else {}), plan.label: merged}


def _known(futures: Any) -> Any:
    """The results of finished tasks, quoted: for a task that writes down what is known, no edge says anything.

    Prefect's server sends each edge as many times as the task it comes from has inputs, and its UI draws none of them
    where it counts more than 500.
    """
    if isinstance(futures, dict):
        return quote({name: future.result() for name, future in futures.items()})
    if isinstance(futures, list):
        return quote([future.result() for future in futures])
    return quote(futures.result() if futures else None)


def finish(*futures: PrefectFuture[Any] | None) -> None:
    """Wait for all; raise what the first one in this order raised, so that the cause comes before what it broke."""
    given = [future for future in futures if future is not None]
    wait(given)
    for future in given:
        result_of(future)
