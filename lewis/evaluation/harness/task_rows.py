"""Check a task file on the rows of its splits: their columns, the first document, and the number of examples."""

import ast
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment

from lewis.errors import InputError, nearest
from lewis.evaluation.harness.task_files import TaskFile
from lewis.input_files import open_regular

NEEDED = ("doc_to_text", "doc_to_target", "doc_to_choice")
TEMPLATES = (*NEEDED, "description", "gen_prefix")


def check_rows(
    task: TaskFile,
    scored: Path | None,
    of_examples: Path | None,
    num_fewshot: int | None,
    templates: SandboxedEnvironment,
) -> None:
    """Check that the columns fill the templates, that the first target is a choice, and that there are enough examples.

    Files in another layout than a JSON object per line, or CSV, are not checked.

    Args:
        task: whose keys, templates and names have been checked.
        scored: the file of the split that is scored; None if it is no such file.
        of_examples: the same for the split of the examples.
        num_fewshot: examples in the prompt; None takes the task's own number. A task that sets 0 keeps 0.
        templates: reads the templates as lm-eval does.

    Raises:
        InputError: naming the first key that is wrong.
    """
    with suppress(_OtherLayoutError):
        if scored is not None and (row := next(_rows(scored), None)) is not None:
            _check_columns(task, scored, row, templates)
            _check_target(task, scored, row, templates)
        if of_examples is not None:
            _check_examples(task, of_examples, num_fewshot)


def _check_columns(task: TaskFile, file: Path, row: Mapping[str, Any], environment: SandboxedEnvironment) -> None:
    """Fill the templates with the first document of a file, as lm-eval does when it loads the task."""
    for key in TEMPLATES:
        text = task.config.get(key)
        if not isinstance(text, str) or text in row or text in task.functions:
            continue
        unknown = meta.find_undeclared_variables(environment.parse(text)) - {*row, *environment.globals}
        a_column = key == "doc_to_choice" and text.isidentifier()  # as a template it would be no list
        if not unknown and not a_column:
            continue
        columns = {column for each in _rows(file) for column in each}  # a row is None in a column that it lacks
        if a_column and text not in columns:
            raise InputError(f"{task.path}: {key}: {file} has no column {text!r}{nearest(text, columns)}")
        try:
            environment.from_string(text).render({**dict.fromkeys(columns), **row})
        except UndefinedError as error:
            if text not in columns and any(error.message == f"{name!r} is undefined" for name in unknown - columns):
                listed = ", ".join(sorted(columns))
                raise InputError(f"{task.path}: {key}: {error.message}; {file} has the columns {listed}") from error
        except Exception:  # what a template does with a value can raise anything
            pass


def _check_target(task: TaskFile, file: Path, row: Mapping[str, Any], environment: SandboxedEnvironment) -> None:
    """Check that the choices of a file's first document are texts and its target is the index of one, if it is one."""
    given = {key: task.config.get(key) for key in ("doc_to_choice", "doc_to_target")}
    if given["doc_to_choice"] is None or any(value in task.functions for value in given.values()):
        return
    found = dict[str, Any]()
    for key, value in given.items():
        found[key] = value
        if isinstance(value, str):
            try:
                found[key] = row[value] if value in row else environment.from_string(value).render(row)
            except Exception:  # what a template does with a value can raise anything
                return
            if value not in row and (key == "doc_to_choice" or found[key].isdigit()):  # lm-eval reads both as literals
                with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                    found[key] = ast.literal_eval(found[key])
    choices, target = found["doc_to_choice"], found["doc_to_target"]
    choices = list(choices.values()) if isinstance(choices, dict) else choices
    about = f"in the first document of {file}"
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(each, str) for each in choices):
        raise InputError(f"{task.path}: doc_to_choice: expected a list of texts {about}, got {reprlib.repr(choices)}")
    if isinstance(target, int) and not -len(choices) <= target < len(choices):
        raise InputError(
            f"{task.path}: doc_to_target: expected the index of one of {len(choices)} choices, from 0, {about}, "
            f"got {target}"
        )
    generates = task.output_type == "generate_until"
    if generates and not isinstance(target, int) and "process_results" not in task.config:
        raise InputError(
            f"{task.path}: doc_to_target: expected the index of a choice {about}, since the task generates and has "
            f"doc_to_choice, got {target!r}"
        )


def _check_examples(task: TaskFile, file: Path, num_fewshot: int | None) -> None:
    """Check that the split of the examples, which is this file, has enough rows for a prompt."""
    own = task.config.get("num_fewshot")
    shots = own if own == 0 or num_fewshot is None else num_fewshot
    if not isinstance(shots, int) or shots <= 0:
        return
    if own_config := task.config.get("fewshot_config"):
        samples = own_config.get("samples")
        if isinstance(samples, list) and own_config.get("split", task.config.get("fewshot_split")) is None:
            _check_samples(task, file, samples, shots)
        return
    # Where these two splits are the same, or missing both, lm-eval draws one more: the document itself is left out.
    needed = shots + (task.config.get("fewshot_split") == task.config.get("test_split"))
    if (found := sum(1 for _ in islice(_rows(file), needed))) < needed:
        raise InputError(
            f"{task.path}: num_fewshot: {shots} examples need {needed} rows, and {file} has {found}; "
            "set fewer, or add rows"
        )


def _check_samples(task: TaskFile, file: Path, samples: Sequence[Mapping[str, Any]], shots: int) -> None:
    """Check that the examples that the task itself gives are enough, and have the columns that are asked of them."""
    if len(samples) < shots:
        raise InputError(
            f"{task.path}: fewshot_config: samples: num_fewshot is {shots}, and there are {len(samples)}; "
            "set fewer, or add some"
        )
    given, columns = {**task.config, **task.config["fewshot_config"]}, next(_rows(file), {}).keys()
    for text in (given.get(key) for key in NEEDED):
        if isinstance(text, str) and text in columns and any(text not in sample for sample in samples):
            raise InputError(f"{task.path}: fewshot_config: samples: expected the key {text!r} in each, as in {file}")


class _OtherLayoutError(Exception):
    """A file is no CSV, or has not a JSON object per line. lm-eval also reads a list, or objects over several lines."""


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, or of a file with a JSON object per line; raises _OtherLayoutError where it is neither."""
    with open_regular(file) as lines:
        if file.suffix == ".csv":
            import pandas as pd  # slow to import

            try:  # as `datasets` reads it
                for part in pd.read_csv(lines, chunksize=1000):
                    yield from part.to_dict("records")
            except ValueError as error:
                raise _OtherLayoutError from error
            return
        for line in lines:
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise _OtherLayoutError from error
                if not isinstance(row, dict):
                    raise _OtherLayoutError
                yield row
