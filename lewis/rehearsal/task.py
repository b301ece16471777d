"""Ask lm-eval what a task is: which scores it gives, and on how many documents; it runs the task on a few of them."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lewis.rehearsal.no_rows import elsewhere, standing_in
from lewis.rehearsal.one_word import ANSWER, one_word_model
from lewis.rehearsal.question import Question, UnfitError
from lewis.rehearsal.shown import show
from lewis.rehearsal.untrusted import functions_refused, no_package_list, sandboxed_templates
from lewis.rehearsal.values import aggregation_of, plain_value

DOCUMENTS = 8  # of each task that are asked
ASKED = "<recipe>.yaml"
"""Name of the file that holds what the recipe asks of all tasks: `num_fewshot` and `apply_chat_template`."""
_UNKNOWN: dict[str, Any] = {"tasks": {}, "groups": {}, "unknown": True}


@dataclass(frozen=True)
class Task(Question):
    """A task, a group or a tag of lm-eval, from files of the recipe or as it comes with lm-eval.

    `files` holds the recipe's YAML files with what they include, named by paths from `place`, the recipe's folder; and
    `ASKED`. What lies next to the files, and data files, is read from their folders. `settings`:

    * `task`: the name to ask for;
    * `defining`: names of those files that define tasks, the last of which counts for a name;
    * `builtin`: paths of lm-eval's own files, from its package, of the task and all its members;
    * `digests`: path -> content of each Python file and data file that decides the answer;
    * `allow_code`: whether the recipe allows code; `own_code`: whether its files bring some;
    * `rows`: whether documents are read, if they are files;
    * `network`: whether an evaluation of the task reaches other machines, which this question does not;
    * `generates`: whether the backend takes the settings of a generation as transformers does.

    The answer: `tasks`, name -> `scores` (rows with `name`, `filter`, `higher_is_better`, `per_document`; None where
    only a run shows them), `documents` (their number; None if it is not known before the run) and `dataset` (repo on
    the Hub, or None); `groups`, name -> `tasks`, the names of all tasks in it, and `scores`. With `unknown` it says
    nothing, as only a run shows it.

    Documents on another machine are not downloaded for this; `lewis.rehearsal.no_rows` says what is asked without.
    """

    name = "task"
    semantics = 1
    libraries = ("lm-eval", "datasets", "transformers")
    imports = (
        "lm_eval.evaluator",
        "lm_eval.models.huggingface",
        "accelerate",
        "transformers.models.llama.modeling_llama",
    )

    @property
    def code(self) -> bool:
        """Whether the task's files bring code."""
        return bool(self.settings["own_code"])

    def texts(self) -> list[str]:
        """What any template may be, and any target among choices."""
        return ["", "0"]

    def reads(self) -> list[str]:
        """The recipe's folder, and the files outside of it."""
        named = (*(name for name in self.files if name != ASKED), *self.settings["digests"])
        return [self.place, *(os.path.normpath(os.path.join(self.place, name)) for name in named)]

    def ask(self) -> dict[str, Any]:
        """Load the task, and run it on its first documents; see the class for the answer.

        Raises:
            UnfitError: if lm-eval gives no score, or counts no answer as right.
            Exception: whatever lm-eval raises, or logs as an error.
        """
        import lm_eval
        from lm_eval.tasks import TaskManager

        ours = Path(lm_eval.__file__).parent
        with ExitStack() as held:
            place = Path(held.enter_context(tempfile.TemporaryDirectory()))
            held.enter_context(contextlib.chdir(self.place or place))
            held.enter_context(sandboxed_templates())
            held.enter_context(no_package_list())
            if not self.settings["allow_code"]:
                held.enter_context(functions_refused())
            if not self.settings["network"]:  # else what it cannot find it may find in an evaluation
                held.enter_context(_errors_raised())
            texts = {name: text for name, text in self.files.items() if name != ASKED}
            shown = show(texts, Path(self.place), place / "shown")
            own = [shown[name] for name in self.settings["defining"]]
            include = [
                _links(place / name, paths)
                for name, paths in {"builtin": [ours / path for path in self.settings["builtin"]], "own": own}.items()
            ]
            manager: Any = TaskManager(include_path=include, include_defaults=False)
            if any(entry.kind.name == "PY_TASK" for entry in manager.task_index.values()):
                return _UNKNOWN  # only its code knows, and that needs the rows
            return self._answer(manager, ours)

    def _answer(self, manager: Any, ours: Path) -> dict[str, Any]:
        def without_rows(config: Mapping[str, Any]) -> bool:
            source = (config.get("metadata") or {}).get("config_source", "")
            if not self.settings["defining"] or not self.settings["rows"] or str(ours) in source:
                return True
            return elsewhere(config, Path(self.place))

        with standing_in(without_rows) as stand_ins:
            try:
                loaded = manager.load([self.settings["task"]])
            except Exception as error:
                if self.settings["network"] and _misses_a_file(error):
                    return _UNKNOWN  # a module of the task reads from another machine when it is imported
                raise
        if not loaded["tasks"]:
            raise UnfitError("lm-eval finds no task in it")
        lm = one_word_model()
        if not self.settings["generates"]:
            lm.generate_until = lambda requests, **_: [ANSWER] * len(requests)
        tasks, results = dict[str, Any](), dict[str, Any]()
        for name, task in loaded["tasks"].items():
            alone, absent = {"tasks": {name: task}, "groups": {}, "group_map": {}}, name in stand_ins
            manager.load = lambda _, alone=alone: alone
            scores: list[dict[str, Any]] | None = None
            if not absent or task.config.process_results is None:
                try:
                    results[name], scores = self._run(lm, manager, name, task)
                except Exception:
                    if not absent:  # else what its filters make of the stand-ins says nothing
                        raise
            tasks[name] = {
                "scores": scores,
                "documents": None if absent else len(task.task_docs),
                "dataset": task.config.dataset_path if absent else None,
            }
        return {"tasks": tasks, "groups": {name: _group(of, tasks, results) for name, of in loaded["groups"].items()}}

    def _run(self, lm: Any, manager: Any, name: str, task: Any) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        """lm-eval's results of one task, and its scores."""
        from lm_eval.evaluator import simple_evaluate

        allowed = {"confirm_run_unsafe_code": self.settings["allow_code"], "log_samples": True, "bootstrap_iters": 0}
        asked = yaml.safe_load(self.files[ASKED]).get("evaluate") or {}
        found: Any = simple_evaluate(model=lm, tasks=[name], task_manager=manager, limit=DOCUMENTS, **allowed, **asked)
        rows, result = found["samples"][name], found["results"][name]
        scores = []
        for metric, filter_ in _names(result):
            values = [plain_value(row.get(metric)) for row in rows if row["filter"] == filter_]
            scores.append(
                {
                    "name": metric,
                    "filter": filter_,
                    "higher_is_better": found["higher_is_better"][name].get(metric),
                    "aggregation": (kind := aggregation_of(task, metric)),
                    "per_document": kind is not None and any(value is not None for value in values),
                }
            )
        if not scores:
            metrics = sorted({metric for row in rows for metric in row["metrics"]}) or "none of its metrics"
            raise UnfitError(f"{name}: lm-eval computes {metrics}, which gives no score for {task.OUTPUT_TYPE}")
        if task.OUTPUT_TYPE == "multiple_choice" and task.config.process_results is None:
            _check_right(name, task, rows)
        return result, scores


def _misses_a_file(error: BaseException | None) -> bool:
    """Whether an error comes from one about a file, the network, or data of nltk, which it raises a LookupError for."""
    while error is not None:
        if isinstance(error, OSError) or type(error) is LookupError:
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_right(name: str, task: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that in some document one of the choices is right; the task gives no other metric than `acc` afterwards."""
    task.override_metric("acc")
    for row in rows:
        choices = range(len(task.doc_to_choice(row["doc"])))
        answers = ([(0.0 if at == taken else -1.0, at == taken) for at in choices] for taken in choices)
        if any(task.process_results(row["doc"], answer)["acc"] for answer in answers):
            return
    target = rows[0]["target"]
    raise UnfitError(
        f"{name}: no choice counts as right in the first {len(rows)} documents: the target of the first is {target!r}; "
        "expected one of the choices, or its index from 0"
    )


def _group(group: Any, tasks: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    inside = [task.task_name for task in group.get_all_tasks()]
    if any(tasks[name]["scores"] is None for name in inside):
        return {"tasks": inside, "scores": None}
    means = {each.metric for each in group.aggregate_metric_list or () if each.aggregation == "mean"}
    scores = []
    for metric, filter_ in _names(group.aggregate(dict(results))):
        parts = [
            row for name in inside for row in tasks[name]["scores"] if (row["name"], row["filter"]) == (metric, filter_)
        ]
        higher = {row["higher_is_better"] for row in parts}
        scores.append(
            {
                "name": metric,
                "filter": filter_,
                "higher_is_better": higher.pop() if len(higher) == 1 else None,
                "aggregation": "mean",
                "per_document": metric in means and bool(parts) and all(row["per_document"] for row in parts),
            }
        )
    return {"tasks": inside, "scores": scores}


def _names(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Metric and filter of each number among lm-eval's results of a task or a group."""
    for key, value in result.items():
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, filter_


def _links(folder: Path, paths: Sequence[Path]) -> str:
    """A folder with links to files, which lm-eval follows: so it finds the functions next to a file."""
    folder.mkdir()
    for number, path in enumerate(paths):
        (folder / f"{number}.yaml").symlink_to(path)
    return str(folder)


@contextmanager
def _errors_raised() -> Iterator[None]:
    """Raise a ValueError at the end of the block for the first error that lm-eval has only logged in it."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said, handler, logger = list[str](), Kept(logging.ERROR), logging.getLogger("lm_eval")
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        if said:  # such as that a metric was not found, which is None from then on
            raise ValueError(said[0]) from error
        raise
    finally:
        logger.removeHandler(handler)
    if said:
        raise ValueError(said[0])
