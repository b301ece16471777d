"""Score one model with lm-eval."""

from contextlib import nullcontext

from prefect import task
from prefect.cache_policies import NO_CACHE

from lewis import store
from lewis.evaluation import step
from lewis.evaluation.harness import backends, lm_eval, server, task_metrics
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import ScoresEntry
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis_tasks.support import assets
from lewis_tasks.support.caching import Progress, cached, computing_in
from lewis_tasks.support.device_slot import device_slot


@task(name="check-tasks", task_run_name="check tasks", cache_policy=NO_CACHE, timeout_seconds=600)
def check_tasks(recipe: Recipe, settings: EvalSettings, here: bool = True) -> str:
    """Check that lm-eval's tasks exist and give the scores that the recipe names, before any other work.

    Gives the tasks' digest, for the cache key of scores. The backend is checked if it is used `here`.
    """
    lm_eval.check_tasks(settings)
    if recipe.evaluate:
        searched = recipe.search.metrics if recipe.search else ()
        task_metrics.check_names(recipe.evaluate, settings.root, recipe.gate, searched)
    if here:
        backends.check(settings.backend)
    return lm_eval.tasks_digest(settings)


# No timeout here: lm-eval runs in a child process, under the recipe's time limit.
@task(
    name="evaluate",
    task_run_name="evaluate {label}",
    **cached("model.key", "tasks_digest", device_of=computing_in),
)
def evaluate(model: ModelFiles | MergedModel, label: str, settings: EvalSettings, tasks_digest: str) -> ScoresEntry:
    """Score one model on all tasks of lm-eval; ends as `Cached` if the store has the scores.

    `tasks_digest` is for the cache key.
    """
    files = model.files(label) if isinstance(model, MergedModel) else model
    shown = Progress("evaluate", f"evaluate {label}")
    elsewhere = settings.backend == "openai" and server.is_url()
    with nullcontext("cpu") if elsewhere else device_slot(gpus=settings.gpus) as device, store.noticing() as made:
        entry = step.score(files, settings, device=device, progress=lambda _, done, total: shown(done / total))
    return assets.made_or_found(entry, entry.path, f"scores of {label}", made)


@task(name="take-scores", task_run_name="take the scores of {label}", cache_policy=NO_CACHE)
def take_scores(entry: ScoresEntry, label: str, found: bool) -> ScoresEntry:
    """Scores that workers of another work queue have made; ends as `Cached` if they were `found` without a run."""
    return assets.made_or_found(entry, entry.path, f"scores of {label}", [] if found else [entry.path])
