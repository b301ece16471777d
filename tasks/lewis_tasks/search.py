"""Tasks of the search: score a trial, record all trials, compare the best one with the unchanged recipe."""

import json
from dataclasses import asdict
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scored import MERGED, comparison_rows
from lewis.evaluation.step import ModelScores, scored_models
from lewis.recipe.recipe import Recipe
from lewis.registry.registration import flat_parameters
from lewis.reports.markdown import picture
from lewis.search import report as search_report
from lewis.search import runs, trial
from lewis.search.study import Objective, Trial
from lewis.steps.graph import graph
from lewis_tasks.support.assets import artifact_key
from lewis_tasks.support.caching import RETRIES, Progress, raise_if_stopping
from lewis_tasks.support.device_slot import device_slot


# No cache: the step itself finds the scores of a merge that was scored before. No retry: a failed trial is a result.
@task(name="trial", task_run_name="trial {number}, {part}", cache_policy=NO_CACHE)
def score_trial(recipe: Recipe, number: int, part: str, known: dict[str, Any], settings: EvalSettings) -> ModelScores:
    """Merge with a trial's values and score the result.

    Args:
        recipe: with the trial's values in it.
        number: of the trial.
        part: which of the search's documents, for the name of the task run.
        known: results of the graph's first nodes.
        settings: what is scored.
    """
    with device_slot(gives_way=True, gpus=settings.gpus) as device:
        raise_if_stopping(f"trial {number}")
        report = Progress(artifact_key(recipe, "trial"), f"trial {number}")
        return trial.score_trial(graph(recipe), MERGED, known, settings, device=device, report=report)


@task(name="record-search", task_run_name="record search", cache_policy=NO_CACHE, timeout_seconds=600, **RETRIES)
def record_search(
    recipe: Recipe, digest: str, objectives: list[Objective], trials: list[Trial], front: list[Trial], ended: bool
) -> str:
    """Record the trials as a table in the UI and as MLflow runs, at the end pictures; return the search's run id."""
    table = search_report.rows(trials, objectives)
    key = artifact_key(recipe, "search")
    team = recipe.register_as.team if recipe.register_as else ""
    about = recipe.name, team, flat_parameters(recipe), digest, objectives, trials
    create_table_artifact(table, key=f"{key}-table", description="What the search has tried")
    if not ended:
        return runs.record(*about)
    files = {
        "search_history.png": search_report.history(trials, objectives),
        "recipe.yaml": recipe.public_text.encode(),
    }
    if len(objectives) > 1:
        files["search_pareto.png"] = search_report.pareto(trials, front, objectives)
    pictures = "\n\n".join(picture(name, data) for name, data in files.items() if name.endswith(".png"))
    create_markdown_artifact(f"# Search\n\n{pictures}", key=f"{key}-history", description="The trials' scores")
    files["trials.json"] = json.dumps([asdict(trial) for trial in trials], indent=2).encode()
    tags = {"lewis.best": json.dumps(dict(front[0].values))} if front else {}
    return runs.record(*about, files=files, tags=tags)


@task(name="confirm", task_run_name="confirm", cache_policy=NO_CACHE, timeout_seconds=600)
def compare_with_default(recipe: Recipe, default: ModelScores, best: ModelScores) -> list[dict[str, str]]:
    """Compare the best trial with the unchanged recipe on documents that the search did not see; return the table."""
    rows = comparison_rows(scored_models(recipe.score_weights, {"default": default, "searched": best}))
    create_table_artifact(
        rows, key=artifact_key(recipe, "search-confirmed"), description="On the documents that the search did not see"
    )
    return rows
