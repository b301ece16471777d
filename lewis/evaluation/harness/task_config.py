"""Check the content of a task file before any work: what lm-eval would find only after the merge."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from lewis.errors import InputError, nearest
from lewis.evaluation.harness.task_files import TaskFile


def check_config(task: TaskFile) -> None:
    """Check the keys of a task, the splits that are read, and the templates.

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
    splits = (config.get("dataset_kwargs") or {}).get("data_files")
    for key in _read_splits(config):
        if isinstance(splits, Mapping) and (name := config[key]) not in splits:
            raise InputError(f"{task.path}: {key}: no split {name!r} in data_files{nearest(str(name), splits)}")
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description"):
        try:
            Environment().parse(text if isinstance(text := config.get(key), str) else "")
        except TemplateSyntaxError as error:
            raise InputError(f"{task.path}: {key}: not a valid Jinja template: {error.message}") from error


def _read_splits(config: Mapping[str, Any]) -> list[str]:
    """The keys of the splits that lm-eval reads: the one that is scored, and the one of the examples, even if none."""
    of_examples = [] if config.get("fewshot_config") else ["training_split", "validation_split"]
    orders = (["test_split", "validation_split"], ["fewshot_split", *of_examples])
    found = (next((key for key in keys if config.get(key) is not None), None) for keys in orders)
    return [key for key in found if key]
