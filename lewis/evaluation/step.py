"""The evaluation step: the scores of a model, found in the store or computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lewis import store
from lewis.devices import default_device, precision
from lewis.evaluation import lm_eval, work_queue
from lewis.evaluation.kept import Kept, kept
from lewis.evaluation.lm_eval import EvalSettings
from lewis.evaluation.scored import Scored
from lewis.evaluation.scores import Evaluated, Score
from lewis.evaluation.written import loadable
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.store import kinds
from lewis.store.reference import JsonReference


class ScoresEntry(JsonReference):
    """What lm-eval said of one model, in the store."""

    holds: ClassVar[str] = "results"
    ref: str

    @property
    def evaluated(self) -> Evaluated:
        """Scores and samples; read from the disk at each access."""
        self.content(self.holds)  # which says what to do if it is gone
        return Evaluated.of(self.ref, store.read_entry(self.path) or {})

    @property
    def scores(self) -> list[Score]:
        """One per task and metric; read from the disk at each access."""
        return self.evaluated.scores


def score(
    files: ModelFiles,
    settings: EvalSettings,
    *,
    root: Path,
    device: str = "cpu",
    progress: Callable[[float, str], None] | None = None,
) -> ScoresEntry:
    """Scores of one model: found in the store, or computed once per model content, tasks and version of lm-eval.

    Raises:
        LewisError: if the model is a merged one that is damaged; or as `lm_eval.evaluate`.
    """
    digest, path = _scores_place(files.key, settings, root, device)
    with store.turn(kinds.SCORES, digest):
        if store.entry(path, "results") is None:
            files.check()
            with loadable(files, whole=settings.backend != "hf") as (folder, adapter):
                found = lm_eval.evaluate(folder, settings, root=root, adapter=adapter, device=device, progress=progress)
            store.write_entry(path, {"model": files.key, "ref": files.ref, **found.content})
    return ScoresEntry(ref=files.ref, digest=digest, path=path)


def find_scores(ref: str, key: str, settings: EvalSettings, root: Path, device: str = "cpu") -> ScoresEntry | None:
    """The scores of a model, if the store has them."""
    digest, path = _scores_place(key, settings, root, device)
    return None if store.entry(path, "results") is None else ScoresEntry(ref=ref, digest=digest, path=path)


def scoring_devices() -> tuple[str, ...]:
    """For which devices scores in the store count: workers of another queue may have a GPU, and this machine none."""
    return ("cuda", "cpu") if work_queue.queue() else (default_device(),)


def find_all_scores(
    models: Mapping[str, tuple[str, str]], settings: EvalSettings, root: Path
) -> dict[str, ScoresEntry] | None:
    """The scores of all models, all computed in one number format so that they can be compared; None if one is missing.

    Args:
        models: label -> reference and key of the model.
        settings: what to score, and how.
        root: the recipe's folder.
    """
    for device in scoring_devices():
        found = {label: find_scores(ref, key, settings, root, device) for label, (ref, key) in models.items()}
        whole = {label: entry for label, entry in found.items() if entry}
        if len(whole) == len(models):
            return whole
    return None


def _scores_place(key: str, settings: EvalSettings, root: Path, device: str) -> tuple[str, Path]:
    numbers = precision(device) if settings.backend == "hf" else settings.backend
    digest = store.digest([key, lm_eval.tasks_digest(settings, root), numbers])
    return digest, kinds.SCORES.path(digest)


def scored(recipe: Recipe, entries: Mapping[str, ScoresEntry]) -> list[Scored]:
    """The models of an evaluation side by side, with the recipe's weighted mean, in the order of the tables.

    Raises:
        InputError: if `evaluate.weights` names a score that does not exist.
    """
    weights = recipe.evaluate.weights if recipe.evaluate else {}
    return [Scored.of(label, entry.content("model"), entry.evaluated, weights) for label, entry in entries.items()]


def kept_gains(recipe: Recipe, models: Sequence[Scored]) -> list[Kept]:
    """`kept`, where the gate's metric is the primary one of its task.

    Args:
        models: everything that was scored, the merged model last.
    """
    gate = recipe.register_as.gate if recipe.register_as else None
    return kept(models, gate.metric if gate else None)


def eval_settings(recipe: Recipe) -> EvalSettings:
    """The recipe's `evaluate` block as lm-eval settings."""
    block = recipe.evaluate
    assert block is not None
    return EvalSettings(
        tasks=block.tasks,
        limit=block.limit,
        num_fewshot=block.num_fewshot,
        batch_size=block.batch_size,
        timeout_s=60 * block.timeout_minutes,
        apply_chat_template=block.apply_chat_template,
        documents=block.documents,
        allow_code_execution=block.allow_code_execution,
        backend=block.backend,
        model_args=block.model_args,
        gpus=block.gpus,
    )
