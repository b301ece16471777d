"""Have lm-eval score a model in a child process: on which tasks, and with which options."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lewis.errors import InputError, LewisError
from lewis.evaluation.harness import backends, builtin_tasks, process, server
from lewis.evaluation.harness.permission import check_code, runs_code
from lewis.evaluation.harness.task_files import FoundTasks, data_files, find_tasks, reads_hub
from lewis.evaluation.statistics.scores import Evaluated, Score
from lewis.progress import Report, silent
from lewis.recipe.schema import Backend, Documents, Evaluate
from lewis.store import digest, file_sha256
from lewis.walls import isolation

logger = logging.getLogger(__name__)

SEMANTICS = 3  # raise it when the same model and tasks would get different scores
CHAT_SEMANTICS = 2  # raise it when they would only with a chat template
BOOTSTRAPS = 100  # resamples for the standard error of metrics that have no formula for it


@dataclass(frozen=True)
class EvalSettings:
    """What to score, and how.

    Attributes:
        tasks: names of lm-eval's tasks or groups, or of YAML files relative to `root`.
        root: the recipe's folder. Task files are looked up in it, and relative paths in them start there.
        limit: documents per task; below 1 it is a fraction.
        num_fewshot: examples in the prompt; None takes each task's own number. A task that sets 0 keeps 0.
        batch_size: requests per forward pass, or "auto".
        timeout_s: seconds for one task of one model.
        documents: `all`, or one of two disjoint halves of every task's documents. A document's hash decides its half;
            the limit applies within the half. Or `by_release`: `limit` of all documents, drawn by the seed.
        allow_code_execution: whether task files may run code: functions of their own, and what the model writes.
        backend: `hf`, `vllm`, `sglang` or `openai`, as in the recipe.
        model_args: further arguments of the backend, which `lewis.recipe.model_args` has checked.
        gpus: how many GPUs one evaluation takes.
        seed: of `by_release`: the digest of the merge.
        look: how many of these documents are scored, drawn at random; None: all. A larger look contains a smaller one.
        among: all tasks of the recipe, if `tasks` are some of them: their files are looked up as if all were asked for.
    """

    tasks: tuple[str, ...]
    root: Path
    limit: int | float | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 16
    timeout_s: float = 3600
    apply_chat_template: bool = False
    documents: Documents = "all"
    allow_code_execution: bool = False
    backend: Backend = "hf"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 1
    seed: str = ""
    look: int | None = None
    among: tuple[str, ...] = ()

    def by_task(self) -> "list[EvalSettings]":
        """The same settings for each task alone."""
        among = self.among or self.tasks
        return [replace(self, tasks=(task,), among=among) for task in dict.fromkeys(self.tasks)]

    def drawn_by(self, digest: str) -> "EvalSettings":
        """The same settings for a merge, whose digest draws the documents of `by_release`."""
        return replace(self, seed=digest) if self.documents == "by_release" else self

    @property
    def whole(self) -> "EvalSettings":
        """The same settings for all documents of the tasks: the answers to any part of these are kept under them."""
        if self.documents != "by_release":
            return replace(self, look=None)
        return replace(self, look=None, documents="all", limit=None, seed="")

    def found(self) -> FoundTasks:
        """Find the files that define the tasks.

        Raises:
            InputError: as `find_tasks`.
        """
        return find_tasks(self.tasks, self.root, self.among)

    @classmethod
    def of(cls, block: Evaluate, root: Path) -> "EvalSettings":
        """The settings of a recipe's `evaluate` block."""
        others = block.model_dump(exclude={"weights", "baselines", "timeout_minutes", "stop", "full_scores"})
        return cls(root=root, timeout_s=60 * block.timeout_minutes, **others)


def tasks_digest(settings: EvalSettings) -> str:
    """Digest of everything but the model that decides its scores: task and data files, options, lm-eval's version.

    A built-in task counts by its name alone, since its documents come from the Hub. Neither the device counts nor the
    path of the recipe's folder.
    """
    found = settings.found()
    files = {
        name: [file_sha256(path) for path in (*task.sources, *data_files(task, settings.root))]
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
            "apply_chat_template": CHAT_SEMANTICS if settings.apply_chat_template else False,
            "documents": settings.documents,
            "allow_code_execution": settings.allow_code_execution,
            **({"seed": settings.seed} if settings.seed else {}),
            **({"look": settings.look} if settings.look else {}),
            **backends.identity(settings.backend, settings.model_args),
        }
    )


def evaluate(
    model: Path,
    settings: EvalSettings,
    *,
    adapter: Path | None = None,
    device: str = "cpu",
    answers: Path | None = None,
    to_serve: bool = False,
    progress: Report = silent,
) -> Evaluated:
    """Score a model with lm-eval in a child process.

    Args:
        model: folder of a Hugging Face checkpoint with its tokenizer.
        settings: what to score, and how.
        adapter: folder of a LoRA adapter to apply to `model`.
        device: as torch names it; several are separated by commas. The CPU computes in float32, any other device in the
            checkpoint's dtype. For backends other than `hf` it says which GPUs they use.
        answers: a file in which finished batches are kept, so that another evaluation of the same model, settings and
            device continues from it; None: nothing is kept.
        to_serve: whether the model may be served: then some requests are kept with its answers, to check its server by.
        progress: called with the kind of requests that is running, how many are done, and how many there are.

    Raises:
        InputError: if `model` or `adapter` is not such a folder, or a task file is broken; as `isolation.check`.
        LewisError: if lm-eval fails, takes longer than `settings.timeout_s`, or gives a number that is not finite, or
            likelihoods that are NaN.
    """
    for folder, file in ((model, "config.json"), (adapter, "adapter_model.safetensors")):
        if folder is not None and not (folder / file).is_file():
            raise InputError(f"{folder}: expected a folder with {file}, which is missing")
    found = settings.found()
    for name, task in found.files.items():
        check_code(name, task, settings.allow_code_execution)
    hub = reads_hub(found, settings.root)
    code = brings_code(settings, found)  # hidden from it: keys, and evaluations that have them
    if code:
        isolation.check()
    with ExitStack() as held:
        include = [held.enter_context(process.scratch_folder()) for _ in range(2)]  # of equal names the last counts
        own = [task.path for task in found.files.values()]
        theirs = [builtin_tasks.package() / path for path in builtin_tasks.files(found.builtin)]
        for folder, paths in zip(include, (theirs, own), strict=True):
            for number, path in enumerate(paths):
                # A link, which lm-eval follows: so it finds the functions next to the file.
                (folder / f"{number}.yaml").symlink_to(path)
        harness = held.enter_context(
            backends.harness_model(
                settings.backend,
                settings.model_args,
                model,
                adapter,
                device,
                code=code,
                patience_s=min(settings.timeout_s, server.PATIENCE),
                tick=lambda: progress("server", 0, 1),
            )
        )
        request = {
            "model": harness.model,
            "model_args": harness.arguments,
            "tasks": found.names,
            "include": [str(folder) for folder in include],
            "device": harness.device,
            "batch_size": settings.batch_size,
            "limit": settings.limit,
            "num_fewshot": settings.num_fewshot,
            "apply_chat_template": settings.apply_chat_template,
            "documents": settings.documents,
            "seed": settings.seed,
            "look": settings.look,
            "answers": str(answers) if answers else None,
            "to_serve": to_serve,
            "bootstrap_iters": BOOTSTRAPS,
            "confirm_run_unsafe_code": settings.allow_code_execution,
        }
        try:
            result = process.run(
                request,
                cwd=settings.root,
                network=hub or harness.network,
                hub=hub,
                token=hub and not code,
                code=code,
                environment=harness.environment,
                shown=[each for folder in (model, adapter) if folder for each in (folder, *folder.iterdir())]
                + [path for task in found.files.values() for path in (*task.sources, *data_files(task, settings.root))],
                timeout_s=settings.timeout_s,
                progress=progress,
            )
        except LewisError as error:
            raise LewisError(f"{adapter or model}: {error}{harness.problem()}") from error
    evaluated = Evaluated.of(str(adapter or model), result)
    perplexity = evaluated.ends.perplexity
    if perplexity is not None and math.isnan(perplexity):  # of NaN, lm-eval takes the first choice as the best one
        raise LewisError(f"{adapter or model}: its likelihoods are NaN: look for NaN or Inf in the model's weights")
    _warn_of_fewshot(settings, result["n-shot"])
    _warn_of_direction(evaluated.scores, result["higher_is_better"])
    return evaluated


def brings_code(settings: EvalSettings, found: FoundTasks) -> bool:
    """Whether the recipe or a model brings code that runs in the evaluation's process."""
    return any(map(runs_code, found.files.values())) or bool(settings.model_args.get("trust_remote_code"))


def _warn_of_fewshot(settings: EvalSettings, shots: Mapping[str, int]) -> None:
    for task, number in shots.items():
        if settings.num_fewshot is not None and number != settings.num_fewshot:
            logger.warning("%s: evaluate.num_fewshot is %d, the task fixes %d", task, settings.num_fewshot, number)


def _warn_of_direction(scores: Sequence[Score], higher_is_better: Mapping[str, Mapping[str, bool | None]]) -> None:
    for score in scores:
        if higher_is_better.get(score.task, {}).get(score.metric.partition(",")[0]) is None:
            logger.warning("%s/%s: its YAML has no higher_is_better; taken as true", score.task, score.metric)
