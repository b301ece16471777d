"""Scores in the form that the Hub reads next to a model card."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import yaml

from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.rehearsed import datasets_of
from lewis.evaluation.statistics.scores import Score
from lewis.recipe.schema import Evaluate


def hub_results(
    evaluate: Evaluate | None,
    root: Path,
    metric: str | None,
    scores: Sequence[Score],
    revisions: Mapping[str, str] = MappingProxyType({}),
    page: str = "",
    part: str = "",
    shots: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """YAML of one score for each task whose documents are a dataset of the Hub; empty if there is none.

    The score is the gate's metric if that is of this task, else the task's first. Scores of a part of the documents are
    left out, since the Hub would compare them with scores of all. The Hub's name of a task within its dataset is taken
    to be lm-eval's.

    Args:
        evaluate: the recipe's block; None: nothing was scored.
        root: the recipe's folder.
        metric: the gate's, as `task/metric,filter`; None: there is no gate.
        scores: of the merged model.
        revisions: task -> commit of its dataset, where that is known.
        page: URL of a page with the scores, for readers of the Hub; empty if there is none.
        part: of which part of the documents the scores are, if the evaluation ended early.
        shots: task -> how many examples its prompts had: a task may fix another number than the recipe's.
    """
    if evaluate is None or part or evaluate.limit is not None or evaluate.documents != "all":
        return ""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    datasets = datasets_of(EvalSettings.of(evaluate, root))
    entries = []
    for task in dict.fromkeys(score.task for score in scores):
        if dataset := datasets.get(task):
            own = [score for score in scores if score.task == task]
            chosen = next((s for s in own if metric == s.key), own[0])
            notes = f"lm-eval {version('lm-eval')}, {chosen.metric}"
            if evaluate.num_fewshot is not None:
                notes += f", {shots.get(task, evaluate.num_fewshot)}-shot"
            entries.append(
                EvalResultEntry(
                    dataset_id=dataset,
                    task_id=task,
                    value=chosen.value,
                    dataset_revision=revisions.get(task),
                    source_url=page or None,
                    notes=notes,
                )
            )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""
