"""A model's scores in the form of the Hub's `.eval_results/*.yaml`, which its leaderboards of datasets read."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lewis.errors import InputError
from lewis.evaluation.harness.task_files import FoundTasks, builtin_task, find_tasks
from lewis.evaluation.statistics.scored import WEIGHTED
from lewis.evaluation.statistics.scores import Score
from lewis.recipe.schema import Evaluate

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def hub_results(evaluate: Evaluate | None, root: Path, metric: str | None, scores: Sequence[Score]) -> str:
    """YAML of one score for each task whose documents are a dataset of the Hub; empty if there is none.

    It is the gate's score, if that is the task's, else the task's first. Scores of a part of the documents are left
    out, since the Hub would compare them with those of all. The Hub's name of a task within its dataset is taken to be
    lm-eval's.

    Args:
        evaluate: the recipe's block; None: nothing was scored.
        root: the recipe's folder.
        metric: the gate's, as `task/metric,filter`; None: there is no gate.
        scores: of the merged model.
    """
    if evaluate is None or evaluate.limit is not None or evaluate.documents != "all":
        return ""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found, entries = find_tasks(evaluate.tasks, root), []
    for task in dict.fromkeys(score.task for score in scores):
        if dataset := _dataset(task, found):
            own = [score for score in scores if score.task == task]
            chosen = next((s for s in own if metric == f"{task}/{s.metric}"), own[0])
            shots = f", {evaluate.num_fewshot}-shot" if evaluate.num_fewshot is not None else ""
            notes = f"lm-eval {version('lm-eval')}, {chosen.metric}{shots}"
            entries.append(EvalResultEntry(dataset_id=dataset, task_id=task, value=chosen.value, notes=notes))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


def _dataset(task: str, found: FoundTasks) -> str | None:
    """The repo of a task's documents; None if they are files, or lm-eval does not say."""
    try:
        config: Mapping[str, Any] = {}
        if task in found.files:
            config = found.files[task].config
        elif found.builtin and task != WEIGHTED[0]:  # reading lm-eval's own tasks takes ten seconds
            config = builtin_task(task)[0]
    except InputError:
        return None
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    files = isinstance(options, Mapping) and "data_files" in options
    return path if isinstance(path, str) and _REPO.fullmatch(path) and not files else None
