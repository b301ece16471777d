"""Which task files run code, and whether the recipe allows it (`evaluate.allow_code_execution`).

A task file is YAML, but lm-eval lets it name Python functions, metrics that are scripts of the `evaluate` library, and
code that a repository brings along. Its Jinja templates run in a sandbox (`lewis.evaluation.harness.child`), so they
need no permission.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.evaluation import sandbox
from lewis.evaluation.harness.task_files import TaskFile, blocks
from lewis.rehearsal.answers import answers
from lewis.rehearsal.lm_eval_itself import Metrics

_READERS = ("cache", "generator", "pandas", "spark", "sql")  # of `datasets`: these read no file of rows
_GENERATION = ("custom_generate", "trust_remote_code")  # of transformers: these run a repository's code


def check_code(name: str, task: TaskFile, allowed: bool) -> None:
    """Check that the recipe allows the code that a task file runs, and that there is a sandbox for generated code.

    Raises:
        InputError: if the file runs code and the recipe does not allow it, or if the task runs what the model writes
            (`unsafe_code: true`) and this machine cannot create the sandbox.
    """
    generated = any(block.get("unsafe_code") for block in blocks(task.config))
    found = next(_code(task), "code that the model writes (unsafe_code: true)" if generated else None)
    if found and not allowed:
        raise InputError(
            f"evaluate.tasks: {name} runs {found}; if you trust {task.path} and the files next to it, say "
            "`allow_code_execution: true` in the block `evaluate`, or else choose a task without code"
        )
    if generated:
        sandbox.check()


def runs_code(task: TaskFile) -> bool:
    """Whether a task file runs code of its own."""
    return next(_code(task), None) is not None


def _code(task: TaskFile) -> Iterator[str]:
    """Describe each piece of code that a task file runs, in words that follow "runs" in an error message."""
    for function in task.functions:
        yield f"code of its own (!function {function})"
    for block in blocks(task.config):
        yield from _code_of_block(block, task.path.parent)


def _code_of_block(block: Mapping[str, Any], folder: Path) -> Iterator[str]:
    source = str(block.get("dataset_path") or "")
    if source in _READERS or source.endswith(".py"):
        yield f"code of its own (dataset_path: {source})"
    for key in ("class", "use_prompt"):
        if block.get(key) is not None:
            yield f"code of its own ({key}: {block[key]})"
    options = block.get("generation_kwargs")
    for key in _GENERATION:
        if isinstance(options, Mapping) and options.get(key) is not None:
            yield f"code of a repository (generation_kwargs: {key})"
    metrics = block.get("metric_list")
    if isinstance(metrics, list) and block.get("process_results") is None:  # else lm-eval loads no metric
        for metric in (each for each in metrics if _is_script(each, folder)):
            yield f"a script of the `evaluate` library (metric: {metric.get('metric')}), not a metric of lm-eval"


def _is_script(metric: Any, folder: Path) -> bool:
    """Whether lm-eval loads a metric as a script of the `evaluate` library, as it does with names that it has not."""
    if not isinstance(metric, Mapping):
        return False
    return bool(metric.get("hf_evaluate")) or str(metric.get("metric")) not in _metrics(folder)


@functools.cache
def _metrics(folder: Path) -> frozenset[str]:
    """The metrics of lm-eval; the process that asks is one that also sees a folder, about which it is asked next."""
    return frozenset(answers([Metrics("the metrics of lm-eval", {}, place=str(folder))])[0]["metrics"])
