"""Scores: lm-eval on the base, the experts, the baselines and the merged model."""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lewis.errors import InputError, LewisError
from lewis.evaluation import harness
from lewis.evaluation.samples import Ends, Samples, read
from lewis.evaluation.task_files import check_builtin, check_unsafe, data_files, find_tasks
from lewis.models.tokenizer import read_vocabulary
from lewis.store import digest, file_sha256

logger = logging.getLogger(__name__)

SEMANTICS = 2  # raise it when the same model and tasks would get other scores than before
BOOTSTRAPS = 100  # for the metrics without a closed form of the standard error


@dataclass(frozen=True)
class Score:
    """One number of lm-eval.

    Attributes:
        metric: lm-eval's key, metric and filter, as in `exact_match,flexible-extract`.
        stderr: standard error, None where lm-eval has none.
        samples: number of documents behind the value.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    samples: int


@dataclass(frozen=True)
class Evaluated:
    """What lm-eval says of one model.

    Attributes:
        scores: every numeric metric of every task, and of every group that aggregates.
        samples: the values of each document, of every metric that a function of two sums makes of them.
        ends: what the gate's guards look at.
        content: all of it as plain data, for the store.
    """

    scores: list[Score]
    samples: list[Samples]
    ends: Ends
    content: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: str, content: Mapping[str, Any]) -> "Evaluated":
        """Read what the harness returned, or the store kept.

        Args:
            model: for the error message.

        Raises:
            LewisError: if a number is not finite, or there is none.
        """
        return cls(_scores(model, content), read(content), Ends(**content["ends"]), content)


@dataclass(frozen=True)
class EvalSettings:
    """What to score, and how.

    Attributes:
        tasks: names of lm-eval's tasks or groups, or of YAML files beside the recipe.
        limit: documents per task; below 1 it is a fraction.
        num_fewshot: examples in the prompt; None is the task's own number, and a task that says 0 keeps it.
        batch_size: requests per forward pass, or "auto".
        timeout_s: seconds for all the tasks of one model.
        documents: `all`, or one of two disjoint halves of every task's documents, which their hashes tell apart; the
            limit counts within it.
        allow_code_execution: whether task files may run programs that the model writes.
    """

    tasks: tuple[str, ...]
    limit: int | float | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 16
    timeout_s: float = 3600
    apply_chat_template: bool = False
    documents: Literal["all", "search", "confirm"] = "all"
    allow_code_execution: bool = False


def check_tasks(tasks: Sequence[str], root: Path, *, allow_code_execution: bool = False) -> None:
    """Check that every task can be found and read, that its data are there and that it may run what it runs.

    Args:
        tasks: as in `EvalSettings`.
        root: the recipe's folder.
        allow_code_execution: whether a task file may run programs that the model writes.

    Raises:
        InputError: naming the task, and the nearest valid names for one that does not exist.
    """
    found = find_tasks(tasks, root)
    for name, task in found.files.items():
        data_files(task, root)
        check_unsafe(name, task, allow_code_execution)
    check_builtin(found.builtin, found.beside)


def tasks_digest(settings: EvalSettings, root: Path) -> str:
    """Digest of all that decides a model's scores except the model: task and data files, options, lm-eval's version.

    Of a built-in task only the name counts: its documents come from the Hub. The device is not covered.
    """
    found = find_tasks(settings.tasks, root)
    files = {
        name: [file_sha256(path) for path in (*task.sources, *data_files(task, root))]
        for name, task in found.files.items()
    }
    return digest(
        {
            "semantics": SEMANTICS,
            "lm_eval": version("lm_eval"),
            "tasks": sorted(found.names),
            "files": files,
            "limit": settings.limit,
            "num_fewshot": settings.num_fewshot,
            "apply_chat_template": settings.apply_chat_template,
            "documents": settings.documents,
            "allow_code_execution": settings.allow_code_execution,
        }
    )


def evaluate(
    model: Path,
    settings: EvalSettings,
    *,
    root: Path,
    adapter: Path | None = None,
    device: str = "cpu",
    progress: harness.Progress | None = None,
) -> Evaluated:
    """Score a model with lm-eval in a child process.

    Args:
        model: folder of a Hugging Face checkpoint with its tokenizer.
        root: the recipe's folder; relative paths in task files start here.
        adapter: folder of a LoRA adapter to apply to `model`.
        device: torch's name of it. The CPU computes in float32, another device in the checkpoint's dtype.
        progress: called with the fraction done of the running kind of requests, and that kind.

    Raises:
        InputError: if `model` or `adapter` is not such a folder, or a task file is broken.
        LewisError: if lm-eval fails, takes longer than `settings.timeout_s`, or gives a number that is not finite.
    """
    _check_folder(model, "config.json")
    arguments = {
        "pretrained": str(model.resolve()),
        "tokenizer": str(model.resolve()),
        "dtype": "float32" if device == "cpu" else "auto",
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if adapter is not None:
        _check_folder(adapter, "adapter_model.safetensors")
        arguments["peft"] = str(adapter.resolve())
        if read_vocabulary(adapter) not in (None, read_vocabulary(model)):  # tokens of its own: lm-eval makes room
            arguments["tokenizer"] = arguments["peft"]
    found = find_tasks(settings.tasks, root)
    with tempfile.TemporaryDirectory(prefix="lewis-tasks-") as include:
        for number, task in enumerate(found.files.values()):
            (Path(include) / f"{number}.yaml").symlink_to(task.path)  # lm-eval resolves it: functions are found beside
        request = {
            "model_args": arguments,
            "tasks": found.names,
            "include": include,
            "defaults": bool(found.builtin),
            "device": device,
            "batch_size": settings.batch_size,
            "limit": settings.limit,
            "num_fewshot": settings.num_fewshot,
            "apply_chat_template": settings.apply_chat_template,
            "documents": settings.documents,
            "bootstrap_iters": BOOTSTRAPS,
            "confirm_run_unsafe_code": settings.allow_code_execution,
        }
        try:
            result = harness.run(request, cwd=root, timeout_s=settings.timeout_s, progress=progress)
        except LewisError as error:
            raise LewisError(f"{adapter or model}: {error}") from error
    evaluated = Evaluated.of(str(adapter or model), result)
    _warn_of_fewshot(settings, result["n-shot"])
    _warn_of_direction(evaluated.scores, result["higher_is_better"])
    return evaluated


def score_table(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, str]]:
    """One row per model, one column per task and metric, as `0.93 ± 0.02`; `*` marks the best of a column.

    The arrow in a column's name says which way is better.
    """
    columns = {(s.task, s.metric): s.higher_is_better for found in scores.values() for s in found}
    cells = {(model, s.task, s.metric): s for model, found in scores.items() for s in found}
    rows = [{"model": model} for model in scores]
    for (task, metric), higher in columns.items():
        values = [cells[key].value for key in cells if key[1:] == (task, metric)]
        best = max(values) if higher else min(values)
        for row in rows:
            score = cells.get((row["model"], task, metric))
            row[f"{task}/{metric} {'↑' if higher else '↓'}"] = _cell(score, best, mark=len(values) > 1)
    return rows


def _cell(score: Score | None, best: float, mark: bool) -> str:
    if score is None:
        return "-"
    spread = "" if score.stderr is None else f" ± {score.stderr:.2g}"
    return f"{score.value:.4g}{spread}" + (" *" if mark and score.value == best else "")


def _scores(model: str, result: Mapping[str, Any]) -> list[Score]:
    scores = []
    for task, found in result["results"].items():
        for key, value in found.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise LewisError(
                    f"{model}: {task}/{key} is {value}: look for NaN or Inf in the model's weights, "
                    "or in what a function of the task gives"
                )
            higher = result["higher_is_better"].get(task, {}).get(metric)
            stderr = found.get(f"{metric}_stderr,{filter_}")
            scores.append(
                Score(
                    task=task,
                    metric=key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    higher_is_better=higher is not False,
                    samples=int(found.get("sample_count", {}).get(key, found["sample_len"])),
                )
            )
    if not scores:
        raise LewisError(f"{model}: lm-eval gave no number for {', '.join(result['results'])}")
    return scores


def _warn_of_fewshot(settings: EvalSettings, shots: Mapping[str, int]) -> None:
    for task, number in shots.items():
        if settings.num_fewshot is not None and number != settings.num_fewshot:
            logger.warning("%s: evaluate.num_fewshot is %d, the task fixes %d", task, settings.num_fewshot, number)


def _warn_of_direction(scores: Sequence[Score], higher_is_better: Mapping[str, Mapping[str, bool | None]]) -> None:
    for score in scores:
        if higher_is_better.get(score.task, {}).get(score.metric.partition(",")[0]) is None:
            logger.warning("%s/%s: its YAML has no higher_is_better; taken as true", score.task, score.metric)


def _check_folder(folder: Path, file: str) -> None:
    if not (folder / file).is_file():
        raise InputError(f"{folder}: expected a folder with {file}, which is missing")
