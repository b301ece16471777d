"""Check before any work what a recipe says of its evaluation: its tasks, and the names of their scores."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lewis.errors import InputError, nearest
from lewis.evaluation.harness import builtin_tasks
from lewis.evaluation.harness.lm_eval import EvalSettings, brings_code
from lewis.evaluation.harness.permission import check_code
from lewis.evaluation.harness.rehearsed import Rehearsed, rehearsed
from lewis.evaluation.harness.task_files import data_files
from lewis.evaluation.statistics.scored import OF_BOTH_KINDS, WEIGHTED
from lewis.recipe.schema import Evaluate, Gate
from lewis.walls import isolation

_Known = Mapping[str, Sequence[str] | None]
"""Task or group -> its scores, each `metric,filter`; None where only a run of the task shows them."""


def check_tasks(settings: EvalSettings) -> None:
    """Check that every task is found, that its data exist, that the recipe allows its code, and that lm-eval takes it.

    Raises:
        InputError: naming the task, and the nearest valid names for one that does not exist; as `isolation.check`.
    """
    found = settings.found()
    for name, task in found.files.items():
        data_files(task, settings.root)
        check_code(name, task, settings.allow_code_execution)
    if brings_code(settings, found):
        isolation.check()
    builtin_tasks.check_builtin(found.builtin, found.local)
    rehearsed(settings)


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
    tasks = rehearsed(EvalSettings.of(evaluate, root))
    known: _Known = {
        name: None if task.scores is None else [row.name for row in task.scores] for name, task in tasks.items()
    }
    valued: _Known = {
        name: None if task.scores is None else [row.name for row in task.scores if row.per_document]
        for name, task in tasks.items()
        if name not in without_values(tasks)
    }
    _check("evaluate.weights", evaluate.weights, valued, per_document=True)
    if {True, False} <= {_is_better_high(name, tasks) for name in evaluate.weights}:
        raise InputError(OF_BOTH_KINDS)
    if evaluate.weights:
        mean = {WEIGHTED[0]: [WEIGHTED[1]]}
        known, valued = {**known, **mean}, {**valued, **mean}
    if gate:
        _check("register.gate.metric", [gate.metric], known)
    if gate and isinstance(gate.tolerance, Mapping):
        _check("register.gate.tolerance", gate.tolerance, valued, per_document=True)
    _check("search.metrics", searched, known)


def without_values(tasks: Mapping[str, Rehearsed]) -> list[str]:
    """The tasks and groups none of whose scores has a value per document."""
    return [
        name
        for name, task in tasks.items()
        if task.scores is not None and not any(row.per_document for row in task.scores)
    ]


def _is_better_high(name: str, tasks: Mapping[str, Rehearsed]) -> bool | None:
    """Whether high values of the score of a weight are better; None where only a run shows it."""
    task = max((each for each in tasks if f"{name}/".startswith(f"{each}/")), key=len)
    rows = [row for row in tasks[task].scores or () if row.per_document]
    score = name.removeprefix(task).removeprefix("/") or (rows[0].name if rows else "")
    return next((row.higher_is_better for row in rows if row.name == score), None)


def _check(where: str, given: Iterable[str], known: _Known, *, per_document: bool = False) -> None:
    """Check names of known scores; with `per_document`, these have a value per document, and tasks may be named."""
    what = "score with a value per document" if per_document else "score"
    for name in given:
        task = max((each for each in known if name.startswith(f"{each}/")), key=len, default=None)
        scores = () if task is None else known[task]
        if (per_document and name in known) or scores is None or name.removeprefix(f"{task}/") in scores:
            continue
        choices = [f"{each}/{score}" for each, found in known.items() for score in found or ()]
        raise InputError(f"{where}: there is no {what} {name!r}{nearest(name, choices)}")
