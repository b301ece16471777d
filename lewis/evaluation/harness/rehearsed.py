"""What lm-eval says of a recipe's tasks before any work: their scores, documents and data sets."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lewis.errors import InputError
from lewis.evaluation.harness import builtin_tasks
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.permission import runs_code
from lewis.evaluation.harness.task_files import data_files, reads_hub
from lewis.input_files import read_text
from lewis.recipe.yaml_text import MAX_BYTES
from lewis.rehearsal.answers import answers, known
from lewis.rehearsal.task import ASKED, Task
from lewis.store import file_sha256

MOST_DATA = 1 << 30  # bytes of a task's files that are read before any work
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ScoreRow:
    """A score that a task or a group gives.

    Attributes:
        name: lm-eval's key of metric and filter, `metric,filter`.
        higher_is_better: None if lm-eval does not say.
        share: whether it is a share of right answers, as far as one can know before a run.
        per_document: whether it is made of a value per document.
    """

    name: str
    higher_is_better: bool | None
    share: bool
    per_document: bool


@dataclass(frozen=True)
class Rehearsed:
    """A task or a group.

    Attributes:
        scores: None where only a run shows them.
        documents: None if their number is not known before a run, or it is a group.
        dataset: repo on the Hub that the documents are from; None if they are files, or it is a group.
        group: whether it is a group.
    """

    scores: tuple[ScoreRow, ...] | None
    documents: int | None = None
    dataset: str | None = None
    group: bool = False


def rehearsed(settings: EvalSettings) -> dict[str, Rehearsed]:
    """Let lm-eval load the tasks and run them on a few documents, each task of the recipe alone.

    Returns:
        Each task and group by its name, with all that are in the groups.

    Raises:
        InputError: if lm-eval refuses a task; as `find_tasks`.
    """
    found = dict[str, Rehearsed]()
    asked = settings.by_task()
    for each, answer in zip(asked, answers([question(each) for each in asked]), strict=True):
        if answer.get("unknown"):
            found.update(dict.fromkeys(each.found().names, Rehearsed(None)))
        for name, task in answer["tasks"].items():
            found[name] = Rehearsed(_rows(task), task["documents"], task["dataset"])
        for name, group in answer["groups"].items():
            found[name] = Rehearsed(_rows(group), group=True)
    return found


def datasets_of(settings: EvalSettings) -> dict[str, str]:
    """Each task whose documents are a dataset of the Hub -> its repo, for the tasks that lm-eval was asked about."""
    try:
        found = [known(question(each)) for each in settings.by_task()]
    except InputError:  # a file has gone since then
        return {}
    tasks = {name: task["dataset"] for answer in found if answer for name, task in answer["tasks"].items()}
    return {name: dataset for name, dataset in tasks.items() if dataset and _REPO.fullmatch(dataset)}


def _rows(given: Mapping[str, Any]) -> tuple[ScoreRow, ...] | None:
    if given["scores"] is None:
        return None
    return tuple(
        ScoreRow(
            f"{row['name']},{row['filter']}",
            row["higher_is_better"],
            row["aggregation"] == "mean" and row["higher_is_better"] is not False,
            row["per_document"],
        )
        for row in given["scores"]
    )


def question(settings: EvalSettings) -> Task:
    """The question about one task of the recipe, whose files were found and may run their code.

    Args:
        settings: with one task.

    Raises:
        InputError: if a file cannot be read; as `find_tasks`.
    """
    found, root = settings.found(), settings.root.resolve()
    own = found.files.values()
    sources = dict.fromkeys(path for task in own for path in task.sources)
    texts = {_name(path, root): read_text(path, MAX_BYTES) for path in sources if path.suffix != ".py"}
    data = dict.fromkeys(path for task in own for path in data_files(task, root))
    others = [*(path for path in sources if path.suffix == ".py"), *data]
    asked = {"num_fewshot": settings.num_fewshot, "apply_chat_template": settings.apply_chat_template}
    [name] = found.names
    return Task(
        f"task {name}",
        {
            **texts,
            ASKED: yaml.safe_dump({"evaluate": {key: value for key, value in asked.items() if value is not None}}),
        },
        {
            "task": name,
            "defining": [_name(task.path, root) for task in own],
            "builtin": builtin_tasks.files(found.builtin),
            "digests": {_name(path, root): file_sha256(path) for path in others},
            "allow_code": settings.allow_code_execution,
            "own_code": any(map(runs_code, own)),
            "rows": sum(path.stat().st_size for path in data) <= MOST_DATA,
            "network": reads_hub(found, root),
            "generates": settings.backend == "hf",
        },
        str(root),
    )


def _name(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)
