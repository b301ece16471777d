"""Check the content of a task file before any work: what lm-eval would find only after the merge."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from lewis.errors import InputError, nearest
from lewis.evaluation.harness.permission import METRICS
from lewis.evaluation.harness.task_files import FoundTasks, TaskFile, members, split_file
from lewis.evaluation.harness.task_rows import NEEDED, TEMPLATES, check_rows

_VALUES: dict[str, tuple[type, ...]] = {  # what the value of a key may be; lm-eval raises for others, in no plain words
    **dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split", "split"), (str,)),
    **dict.fromkeys(("dataset_path", "dataset_name", "description", "gen_prefix"), (str,)),
    **dict.fromkeys(("target_delimiter", "fewshot_delimiter"), (str,)),
    **dict.fromkeys(("num_fewshot", "repeats", "max_gen_toks", "max_new_tokens"), (int,)),
    **{"temperature": (int, float), "until": (str, list)},
    **dict.fromkeys(("metric_list", "filter_list"), (list,)),
    **dict.fromkeys(("fewshot_config", "generation_kwargs"), (dict,)),
    **{"doc_to_text": (str, int), "doc_to_target": (str, int, list), "doc_to_choice": (str, list, dict)},
}
_READERS = ("json", "csv", "parquet", "text")  # of `datasets`: each reads local files
_FUNCTIONS = ("process_docs", "process_results", "custom_dataset")  # keys that take `!function` alone
_WORDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
_OF_NUMBERS = ("bypass", "mean", "median", "nanmean", "perplexity")  # lm-eval's aggregations of a number per document
_OF_METRIC = ("metric", "aggregation", "higher_is_better", "hf_evaluate")  # its other keys are arguments
MEASURED = {  # of its own metrics, those that lm-eval computes for an output type
    "multiple_choice": ("acc", "acc_bytes", "acc_mutual_info", "acc_norm", "brier_score", "exact_match", "f1", "mcc"),
    "generate_until": ("bleu", "bypass", "chrf", "chrf++", "exact_match", "f1", "mcc", "ter"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity", "word_perplexity"),
}


def check_config(task: TaskFile, root: Path, num_fewshot: int | None = None) -> None:
    """Check a task's keys, its splits that are read, its templates, and the names that lm-eval must know.

    Where a split is one local file with a JSON object per line, or a CSV file, also check that its columns fill the
    templates, that its first document has choices and its target is one of them, and that it has enough rows for the
    examples in the prompt.

    Args:
        task: the file's content.
        root: the recipe's folder, in which relative paths start.
        num_fewshot: examples in the prompt; None takes the task's own number. A task that sets 0 keeps 0.

    Raises:
        InputError: naming the first key that is wrong.
    """
    from lm_eval.config.task import TaskConfig

    config = task.config
    if "class" in config or "group" in config:  # the keys are those of a class, or of the members
        return
    known = [field.name for field in fields(TaskConfig)]
    for key in config:
        if key not in (*known, "task_list"):
            raise InputError(f"{task.path}: {key}: unknown key of a task of lm-eval{nearest(str(key), known)}")
    _check_values(task)
    splits = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(splits, str | list):
        splits = {"train": splits}  # as `datasets` calls it
    elif isinstance(splits, Mapping):
        splits = {str(name): of for name, of in splits.items()}  # `datasets` calls 2024 "2024"
    read = _read_splits(config)
    for key, name in read.items():
        if isinstance(splits, Mapping) and name not in splits:
            raise InputError(f"{task.path}: {key}: no split {name!r} in data_files{nearest(str(name), splits)}")
    for key in _missing(config):
        raise InputError(f"{task.path}: {key}: missing; lm-eval needs it")
    environment = _environment()
    for key in TEMPLATES:
        try:
            environment.compile(text if isinstance(text := config.get(key), str) else "")
        except TemplateSyntaxError as error:  # also of a filter that does not exist
            raise InputError(f"{task.path}: {key}: not a valid Jinja template: {error.message}") from error
    _check_names(task)
    if not any(config.get(key) for key in ("process_docs", "use_prompt", "custom_dataset")):
        first, *_, last = [*read, *read]
        check_rows(task, split_file(config, root, first), split_file(config, root, last), num_fewshot, environment)


def _check_values(task: TaskFile) -> None:
    """Check the kinds of the values, the choices, and the keys of `fewshot_config`."""
    from lm_eval.config.task import FewshotConfig

    def check(key: str, right: bool, expected: str, given: object) -> None:
        if not right:
            raise InputError(f"{task.path}: {key}: expected {expected}, got {given!r}")

    inner = {key: task.config.get(key) for key in ("fewshot_config", "generation_kwargs")}
    inside = [(f"{at}: {key}", value) for at, of in inner.items() if isinstance(of, dict) for key, value in of.items()]
    for key, value in (*task.config.items(), *inside):
        kind = str(key).rpartition(": ")[2]
        kinds = _VALUES.get(kind, ())
        if kinds and value is not None:
            check(key, isinstance(value, kinds), " or ".join(_WORDS[each] for each in kinds), value)
        if kind in _FUNCTIONS and value is not None:
            check(key, value in task.functions, "!function MODULE.NAME", value)
        if kind == "samples" and value is not None and value not in task.functions:
            right = isinstance(value, list) and all(isinstance(each, dict) for each in value)
            check(key, right, "a list of mappings, or !function MODULE.NAME", value)
        if key in ("metric_list", "filter_list"):  # of an empty one lm-eval gives no number
            check(key, value != [], "at least one item, or no such key", value)
    repeats = task.config.get("repeats")
    check("repeats", repeats is None or repeats > 0, "at least 1", repeats)
    choices = task.config.get("doc_to_choice")
    listed = list(choices.values()) if isinstance(choices, dict) else choices if isinstance(choices, list) else ["one"]
    check("doc_to_choice", bool(listed), "at least one choice", choices)
    for choice in listed:  # YAML reads a plain yes or no as true or false
        check("doc_to_choice", isinstance(choice, str) and choice != "", "texts, in quotes and not empty", choice)
    known = [field.name for field in fields(FewshotConfig)]
    for key in task.config.get("fewshot_config") or ():
        if key not in known:
            raise InputError(f"{task.path}: fewshot_config: {key}: unknown key{nearest(str(key), known)}")


def _missing(config: Mapping[str, Any]) -> Iterator[str]:
    """What lm-eval needs of a task and this one does not say."""
    if config.get("test_split") is None and config.get("validation_split") is None:
        yield "test_split (or validation_split)"
    if config.get("dataset_path") in _READERS and not config.get("dataset_kwargs"):
        yield "dataset_kwargs: data_files"
    elif config.get("dataset_path") is None and config.get("custom_dataset") is None:
        yield "dataset_path"
    texts = NEEDED if config.get("output_type") == "multiple_choice" else NEEDED[:2]
    yield from (key for key in texts if config.get(key) is None and config.get("use_prompt") is None)


def as_loaded(found: FoundTasks) -> Iterator[TaskFile]:
    """The tasks of the recipe's files as lm-eval loads them: what a group changes in its members, or defines in it.

    Raises:
        InputError: if a group has keys or members that lm-eval cannot use, or contains itself.
    """
    for name in (each for listed in found.names for each in found.tags.get(listed, (listed,))):
        if name in found.files:
            yield from _loaded(found.files[name], {}, found, ())


def _loaded(
    task: TaskFile, changes: Mapping[str, Any], found: FoundTasks, groups: tuple[str, ...]
) -> Iterator[TaskFile]:
    """A task with changes by `groups`, or the members of a group."""
    from lm_eval.config.group import AggMetricConfig, GroupConfig

    if "group" not in task.config:
        yield replace(task, config={**task.config, **changes})
        return
    if task.name in groups:
        raise InputError(f"{task.path}: group {task.name}: it contains itself; remove it from the list `task`")
    means = task.config.get("aggregate_metric_list") or []
    for mean in means if isinstance(means, list) else [means]:
        try:
            given = AggMetricConfig(**mean).filter_list
            chosen = given if given is None or isinstance(given, list) else []
        except (TypeError, ValueError) as error:
            raise InputError(f"{task.path}: aggregate_metric_list: {mean!r}: {error}") from error
        if chosen is not None and (not chosen or not all(isinstance(each, str) and each for each in chosen)):
            message = f"aggregate_metric_list: filter_list: expected names of filters, got {mean['filter_list']!r}"
            raise InputError(f"{task.path}: {message}")
    if not isinstance(task.config.get("task"), list) or not task.config["task"]:
        raise InputError(f"{task.path}: task: expected a list of members, got {task.config.get('task')!r}")
    own = {key: value for key, value in task.config.items() if key not in {each.name for each in fields(GroupConfig)}}
    for item in members(task.config):
        more = {**own, **changes, **(item if isinstance(item, Mapping) else {})}
        name = item if isinstance(item, str) else item.get("group", item.get("task"))
        inside = (*groups, task.name)
        if not isinstance(name, str):
            raise InputError(f"{task.path}: task: expected the name of a member, got {name!r}")
        if name in found.tags:
            if isinstance(item, Mapping):  # lm-eval would give all its tasks one name, and score the last of them
                raise InputError(f"{task.path}: task: {name} is a tag, which has no keys of its own; list its tasks")
            for each in found.tags[name]:
                yield from _loaded(found.files[each], more, found, inside)
        elif name in found.files:
            yield from _loaded(found.files[name], {k: v for k, v in more.items() if k != "group"}, found, inside)
        elif isinstance(item, Mapping) and "group" in item:
            yield from _loaded(replace(task, name=name, config=item), {**own, **changes}, found, inside)
        elif isinstance(item, Mapping) and name not in found.builtin:
            yield replace(task, config=more)


def _read_splits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> split that lm-eval reads: the one that is scored, then that of the examples, even if none are wanted."""
    own = config.get("fewshot_config")
    own = own if isinstance(own, Mapping) else {}
    given = {**config, "fewshot_config: split": own.get("split")}
    first = "fewshot_config: split" if "split" in own else "fewshot_split"
    rest = ["training_split", "validation_split"] if own.get("samples") is None else []
    orders = (["test_split", "validation_split"], [first, *rest])
    found = (next((key for key in keys if given.get(key) is not None), None) for keys in orders)
    return {key: given[key] for key in found if key}


def _check_names(task: TaskFile) -> None:
    """Check the output type, try filters and metrics, and check their names unless the task has functions."""
    import lm_eval.filters  # noqa: F401 - registers the filters
    from lm_eval.api.registry import aggregation_registry, filter_registry
    from lm_eval.api.samplers import SAMPLER_REGISTRY
    from lm_eval.api.task import ALL_OUTPUT_TYPES  # this module registers the aggregations

    def check(key: str, item: Mapping[str, Any], known: Sequence[str]) -> None:
        name = item.get(key.rpartition(": ")[2])
        if name is not None and name not in known:
            raise InputError(f"{task.path}: {key}: lm-eval has no {name!r}{nearest(str(name), known)}")

    def items(key: str, value: object, *needed: str) -> list[Mapping[str, Any]]:
        """The mappings in a list; InputError if an item is none, or lacks a key."""
        listed: list[Any] = value if isinstance(value, list) else [value]
        for item in listed:
            if not isinstance(item, Mapping) or any(item.get(each) is None for each in needed):
                raise InputError(f"{task.path}: {key}: expected mappings with {' and '.join(needed)}, got {item!r}")
        return listed

    check("output_type", task.config, ALL_OUTPUT_TYPES)
    metrics = items("metric_list", task.config.get("metric_list") or [], "metric")
    pipelines = items("filter_list", task.config.get("filter_list") or [], "name", "filter")
    steps = [each for pipeline in pipelines for each in items("filter_list: filter", pipeline["filter"], "function")]
    if broken := [pipeline for pipeline in pipelines if not isinstance(pipeline["filter"], list)]:
        raise InputError(f"{task.path}: filter_list: filter: expected a list of mappings, got {broken[0]['filter']!r}")
    for pipeline in pipelines:
        _try_filters(task, pipeline)
    _try_exact_match(task, metrics)
    if task.functions:  # their modules may register names of their own
        return
    for metric in metrics:
        check("metric_list: aggregation", metric, tuple(aggregation_registry))
        _check_aggregation(task, metric)
    _check_metrics(task, [str(metric["metric"]) for metric in metrics if not metric.get("hf_evaluate")])
    for each in steps:
        check("filter_list: function", each, tuple(filter_registry))
    check("fewshot_config: sampler", task.config.get("fewshot_config") or {}, tuple(SAMPLER_REGISTRY))


def _check_metrics(task: TaskFile, metrics: Sequence[str]) -> None:
    """Check that lm-eval computes one of its metrics for the task's output type, and all of them if it generates."""
    kind = task.output_type
    others = [name for name in metrics if name in METRICS and name not in MEASURED[kind]]
    if others and (kind == "generate_until" or len(others) == len(metrics)):
        raise InputError(
            f"{task.path}: metric_list: metric: lm-eval has no {others[0]} for output_type {kind}; "
            f"expected one of {', '.join(MEASURED[kind])}"
        )


def _check_aggregation(task: TaskFile, metric: Mapping[str, Any]) -> None:
    """Check that a metric of lm-eval that has no number per document is not aggregated as numbers, nor the reverse."""
    from lm_eval.api.registry import aggregation_registry, metric_agg_registry

    name, given = str(metric["metric"]), metric.get("aggregation")
    if given is None or name not in tuple(metric_agg_registry) or metric.get("hf_evaluate"):
        return
    own = next(key for key, value in aggregation_registry.items() if value is metric_agg_registry[name])
    if (given in _OF_NUMBERS) != (own in _OF_NUMBERS):
        raise InputError(
            f"{task.path}: metric_list: aggregation: lm-eval cannot take the {given} of {name}; expected {own}"
        )


def _try_filters(task: TaskFile, pipeline: Mapping[str, Any]) -> None:
    """Give an answer to lm-eval's filters, which lm-eval itself makes and applies once the model has answered all."""
    from lm_eval.api.registry import filter_registry

    kind = task.output_type
    answer: Any = {"generate_until": "1", "loglikelihood_rolling": -1.0}.get(kind, (-1.0, False))
    found: list[Any] = [[answer] * (task.config.get("repeats") or 1)]
    for step in pipeline["filter"]:
        name, options = step["function"], {key: value for key, value in step.items() if key != "function"}
        if name not in tuple(filter_registry) or any(value in task.functions for value in options.values()):
            return
        try:
            found = list(filter_registry[name](**options).apply(found, [{"choices": []}]))
        except IndexError:  # `group_select` of more matches than this answer has
            return
        except Exception as error:
            problem = f"expected the argument {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"{task.path}: filter_list: {pipeline['name']}: lm-eval cannot apply {name} with {options}: {problem}"
            ) from error
    if kind != "generate_until" and "process_results" not in task.config and found != [answer]:
        raise InputError(
            f"{task.path}: filter_list: {pipeline['name']}: expected filters that leave likelihoods as they are and "
            f"end with take_first, since output_type is {kind}, got {[step['function'] for step in pipeline['filter']]}"
        )


def _try_exact_match(task: TaskFile, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Compute lm-eval's `exact_match`, the only metric that takes arguments, with those of the task."""
    from lm_eval.api.metrics import exact_match_hf_evaluate

    if task.output_type != "generate_until" or "process_results" in task.config:
        return
    for metric in metrics:
        options = {key: value for key, value in metric.items() if key not in _OF_METRIC}
        if metric["metric"] == "exact_match" and not metric.get("hf_evaluate"):
            try:
                exact_match_hf_evaluate(predictions=["1"], references=["1"], **options)
            except Exception as error:
                message = f"lm-eval cannot compute exact_match with {options}: {error}"
                raise InputError(f"{task.path}: metric_list: {message}") from error


def _environment() -> SandboxedEnvironment:
    """Jinja as lm-eval has it, but in its sandbox, since a template can run code."""
    from lm_eval.utils import regex_replace

    environment = SandboxedEnvironment(undefined=StrictUndefined)
    environment.filters["regex_replace"] = regex_replace
    return environment
