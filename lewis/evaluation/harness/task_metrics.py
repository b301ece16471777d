"""Find which scores tasks give, so that a wrong name is reported before any work; and the tasks' datasets."""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from lewis.errors import InputError, nearest
from lewis.evaluation.harness.builtin_tasks import builtin_task
from lewis.evaluation.harness.task_files import FoundTasks, find_tasks, members
from lewis.evaluation.statistics.scored import OF_BOTH_KINDS, WEIGHTED
from lewis.evaluation.statistics.scores import SUMMED, Score
from lewis.recipe.schema import Evaluate, Gate

_DEFAULT = {  # lm-eval's metrics of a task that lists none
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}
# With these a group changes its members, and a task gives scores that only its code knows.
_OVERRIDES = {"metric_list", "filter_list", "process_results", "output_type", "class"}
AGGREGATED = {"bleu", "brier_score", "bypass", "chrf", "chrf++", "f1", "mcc", "ter"}
"""lm-eval's metrics that have no value per document: it computes them from all documents together."""
_REPO = re.compile(r"[\w.-]+/[\w.-]+")

Known = Mapping[str, Sequence[str] | None]
"""Task or group -> its scores, each `metric,filter`; None where only a run of the task shows them."""
Configs = Mapping[str, tuple[Mapping[str, Any], Sequence[str] | None]]
"""Task or group -> its config, and its scores as in `Known`."""


def check_names(evaluate: Evaluate, root: Path, gate: Gate | None = None, searched: Sequence[str] = ()) -> None:
    """Check every score that a recipe names: of the gate and its tolerances, of the weights, and of the search.

    Args:
        evaluate: the recipe's block, with the tasks and the weights.
        root: the recipe's folder.
        gate: of the block `register`.
        searched: `search.metrics`.

    Raises:
        InputError: naming the key and the nearest score, if no task gives a score of that name, or a weight or a
            tolerance is for a score without a value per document; or if the weights are of scores of which some are
            better high and others low.
    """
    configs = configs_and_scores(evaluate.tasks, root)
    if configs is None:
        return
    known: Known = {name: scores for name, (_, scores) in configs.items()}
    valued = _with_values(configs)
    _check("evaluate.weights", evaluate.weights, valued, per_document=True)
    if {True, False} <= {_is_better_high(name, configs, valued) for name in evaluate.weights}:
        raise InputError(OF_BOTH_KINDS)
    if evaluate.weights:
        mean = {WEIGHTED[0]: [WEIGHTED[1]]}
        known, valued = {**known, **mean}, {**valued, **mean}
    if gate:
        _check("register.gate.metric", [gate.metric], known)
    if gate and isinstance(gate.tolerance, Mapping):
        _check("register.gate.tolerance", gate.tolerance, valued, per_document=True)
    _check("search.metrics", searched, known)


def configs_and_scores(tasks: Sequence[str], root: Path) -> Configs | None:
    """The config and the scores of each task and group, and of all members of groups, as far as files show them.

    Args:
        tasks: of the recipe.
        root: the recipe's folder.

    Returns:
        None if a group defines or changes members: then no file shows which scores these give.

    Raises:
        InputError: as `find_tasks`.
    """
    found = find_tasks(tasks, root)
    configs: dict[str, tuple[Mapping[str, Any], Sequence[str] | None]] = {}
    groups, pending = dict[str, list[str]](), list(found.names)
    for name in pending:
        config, inside = config_and_members(name, found)
        if inside is None:
            configs[name] = config, _of_task(config)
            continue
        if any(isinstance(each, Mapping) for each in inside) or _OVERRIDES & set(config):
            return None
        configs[name], groups[name] = (config, None), inside
        pending += [each for each in inside if each not in pending]
    for name in groups:
        whole = [name]
        for each in whole:
            whole += [member for member in groups.get(each, ()) if member not in whole]
        config, of_tasks = configs[name][0], [configs[each][1] for each in whole if each not in groups]
        configs[name] = config, _of_group(config, of_tasks)
    return configs


def _with_values(configs: Configs) -> Known:
    """The scores that have a value per document, without tasks and groups that have none."""
    found: dict[str, Sequence[str] | None] = {}
    for name, (config, scores) in configs.items():
        left_out = _without_values(config)
        own = scores if scores is None else [each for each in scores if each.partition(",")[0] not in left_out]
        if own != []:
            found[name] = own
    return found


def _is_better_high(name: str, configs: Configs, valued: Known) -> bool | None:
    """Whether high values of the score of a weight are better; None where the task's file does not show it."""
    from lm_eval.api.registry import is_higher_better

    task = max((each for each in configs if f"{name}/".startswith(f"{each}/")), key=len)
    score = name.removeprefix(task).removeprefix("/") or next(iter(valued[task] or ()), "")
    config, metric = configs[task][0], score.partition(",")[0]
    if not metric or "group" in config:
        return None
    own = [
        each for each in config.get("metric_list") or () if isinstance(each, Mapping) and each.get("metric") == metric
    ]
    higher = own[0]["higher_is_better"] if own and "higher_is_better" in own[0] else is_higher_better(metric)
    return None if higher is None else higher is not False


def without_values(tasks: Sequence[str], root: Path) -> list[str]:
    """The tasks, members of groups included, none of whose scores has a value per document, as far as files show it.

    Args:
        tasks: of the recipe.
        root: the recipe's folder.

    Raises:
        InputError: as `find_tasks`.
    """
    found = []
    for name, (config, _) in (configs_and_scores(tasks, root) or {}).items():
        listed = config.get("metric_list") if "class" not in config else None
        metrics = [each for each in (listed if isinstance(listed, list) else [listed]) if isinstance(each, Mapping)]
        own = "process_results" in config  # the task's code makes the values, whatever lm-eval's metric of a name does
        if metrics and all(
            (not own and str(each.get("metric")) in AGGREGATED)
            or str(each.get("aggregation") or SUMMED[0]) not in SUMMED
            for each in metrics
        ):
            found.append(name)
    return found


def config_and_members(name: str, found: FoundTasks) -> tuple[Mapping[str, Any], list[Any] | None]:
    """The config of a task or group of the recipe or of lm-eval, and the members of a group or tag; None for a task."""
    if name in found.tags:
        return {}, list(found.tags[name])
    if name not in found.files:
        return builtin_task(name)
    config = found.files[name].config
    return config, members(config) if "group" in config else None


def _without_values(config: Mapping[str, Any]) -> set[str]:
    """The metrics that a task or a group lists and that have no value per document, as far as its file shows it."""
    listed = config.get("metric_list") or config.get("aggregate_metric_list") or []
    found = set[str]()
    for each in listed if isinstance(listed, list) else [listed]:
        if isinstance(each, Mapping):
            metric, aggregation = str(each.get("metric")), str(each.get("aggregation") or SUMMED[0])
            if metric in AGGREGATED or not (aggregation in SUMMED or "." in aggregation):  # with a dot: a function
                found.add(metric)
    return found


def _of_task(config: Mapping[str, Any]) -> list[str] | None:
    if "process_results" in config or "class" in config:
        return None
    listed, filters = config.get("metric_list"), config.get("filter_list")
    metrics = _names(listed, "metric") if listed else _DEFAULT.get(str(config.get("output_type")))
    chosen = _names(filters, "name") if filters else ["none"]
    if metrics is None or chosen is None or any("/" in metric or "." in metric for metric in metrics):
        return None  # a function as a metric names its scores itself
    return [f"{metric},{each}" for metric in metrics for each in chosen]


def _of_group(config: Mapping[str, Any], of_tasks: Sequence[Sequence[str] | None]) -> list[str] | None:
    """The means that a group gives of the scores of its tasks; None if only a run of these shows them."""
    listed, scores = config.get("aggregate_metric_list") or [], list[str]()
    known = None if None in of_tasks else dict.fromkeys(score for own in of_tasks for score in own or ())
    for mean in listed if isinstance(listed, list) else [listed]:
        metric, filters = mean.get("metric"), mean.get("filter_list")
        chosen = [filters] if isinstance(filters, str) else filters
        if known is not None:
            parts = ((score, *score.split(",", 1)) for score in known)
            scores += [score for score, name, of in parts if name == metric and (chosen is None or of in chosen)]
        elif chosen is None:
            return None  # all that the members have
        else:
            scores += [f"{metric},{each}" for each in chosen]
    return scores


def _names(listed: Any, key: str) -> list[str] | None:
    """The value of `key` in each mapping of a list; None if an item has none, or is a metric of another package."""
    items = listed if isinstance(listed, list) else [listed]
    names = [each.get(key) if isinstance(each, Mapping) and not each.get("hf_evaluate") else None for each in items]
    found = [name for name in names if isinstance(name, str)]
    return found if len(found) == len(names) else None


def _check(where: str, given: Iterable[str], known: Known, *, per_document: bool = False) -> None:
    """Check names of known scores; with `per_document`, these have a value per document, and tasks may be named."""
    what = "score with a value per document" if per_document else "score"
    for name in given:
        task = max((each for each in known if name.startswith(f"{each}/")), key=len, default=None)
        scores = () if task is None else known[task]
        if (per_document and name in known) or scores is None or name.removeprefix(f"{task}/") in scores:
            continue
        choices = [f"{each}/{score}" for each, found in known.items() for score in found or ()]
        raise InputError(f"{where}: there is no {what} {name!r}{nearest(name, choices)}")


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

    found, entries = find_tasks(evaluate.tasks, root), []
    for task in dict.fromkeys(score.task for score in scores):
        if dataset := _dataset(task, found):
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


def _dataset(task: str, found: FoundTasks) -> str | None:
    """The repo of a task's documents; None if they are files, or lm-eval does not say."""
    try:
        config: Mapping[str, Any] = {}
        if task in found.files:
            config = found.files[task].config
        elif found.builtin and task != WEIGHTED[0]:
            config = builtin_task(task)[0]
    except InputError:
        return None
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    files = isinstance(options, Mapping) and "data_files" in options
    return path if isinstance(path, str) and _REPO.fullmatch(path) and not files else None
