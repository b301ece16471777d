"""Prefect tasks that check what an evaluation is to score, and take over scores that another worker computed."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from lewis.evaluation import pairwise_judge
from lewis.evaluation.harness import backends, lm_eval
from lewis.evaluation.step import ScoresEntry
from lewis.recipe.recipe import Recipe
from lewis.steps.run import check_tasks as checked


@task(name="check-tasks", task_run_name="check tasks", cache_policy=NO_CACHE, timeout_seconds=600)
def check_tasks(recipe: Recipe, here: bool = True) -> str:
    """Check that lm-eval's tasks exist and give the scores that the recipe names, before any other work.

    Also check that the server of the gate's judge is set and, if the models are scored `here`, the scoring backend.
    Return the tasks' digest, which is the same on every worker that scores in the same way.
    """
    settings = checked(recipe)
    assert settings is not None
    if recipe.gate and recipe.gate.judge:
        pairwise_judge.server()  # else the run fails after hours of scoring
    if here:
        backends.check(settings.backend)
    return lm_eval.tasks_digest(settings)


@task(name="take-scores", task_run_name="take the scores of {what}", cache_policy=NO_CACHE)
def take_scores(entry: ScoresEntry, what: str, found: bool) -> Any:
    """Return scores that workers of another work queue computed, as the result of a task of this flow run.

    Args:
        entry: the scores.
        what: model and task, such as `math gsm8k`.
        found: whether all scores were in the store, so that no run was needed; then the task ends as `Cached`.
    """
    return Completed(name="Cached", message=f"scores of {what}: in the store", data=entry) if found else entry
