"""The evaluation step: the scores of a model, found in the store or computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lewis import store
from lewis.devices import default_device, precision
from lewis.errors import LewisError
from lewis.evaluation import work_queue
from lewis.evaluation.harness import lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.model_folder import loadable
from lewis.evaluation.statistics.scored import Scored
from lewis.evaluation.statistics.scores import Evaluated, Score
from lewis.models.source import ModelFiles
from lewis.progress import Report, silent
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


def score(files: ModelFiles, settings: EvalSettings, *, device: str = "cpu", progress: Report = silent) -> ScoresEntry:
    """Scores of one model: found in the store, or computed once per model content, tasks and version of lm-eval.

    Raises:
        LewisError: if the model is a merged one that is damaged, a file of the model or of a task changed meanwhile, or
            as `lm_eval.evaluate`.
    """
    digest = scores_digest(files.key, settings, device)
    path = kinds.SCORES.path(digest)
    with store.turn(kinds.SCORES, digest):
        if store.entry(path, "results") is None:
            files.check()
            with loadable(files, whole=settings.backend != "hf") as (folder, adapter):
                found = lm_eval.evaluate(folder, settings, adapter=adapter, device=device, progress=progress)
            files.check_unchanged()
            if scores_digest(files.key, settings, device) != digest:
                raise LewisError(
                    f"evaluate: a file of {', '.join(settings.tasks)} changed while running, so the scores of "
                    f"{files.ref} are not kept; run again"
                )
            store.write_entry(path, {"model": files.key, "ref": files.ref, **found.content})
    return ScoresEntry(ref=files.ref, digest=digest, path=path)


def find_scores(ref: str, key: str, settings: EvalSettings, device: str = "cpu") -> ScoresEntry | None:
    """The scores of a model, if the store has them."""
    digest = scores_digest(key, settings, device)
    path = kinds.SCORES.path(digest)
    return None if store.entry(path, "results") is None else ScoresEntry(ref=ref, digest=digest, path=path)


def scoring_devices() -> tuple[str, ...]:
    """For which devices scores in the store count: workers of another queue may have a GPU, and this machine none."""
    return ("cuda", "cpu") if work_queue.queue() else (default_device(),)


def find_all_scores(models: Mapping[str, tuple[str, str]], settings: EvalSettings) -> dict[str, ScoresEntry] | None:
    """The scores of all models, in one number format so that they can be compared; None if one is missing."""
    for device in scoring_devices():
        found = {label: find_scores(ref, key, settings, device) for label, (ref, key) in models.items()}
        whole = {label: entry for label, entry in found.items() if entry}
        if len(whole) == len(models):
            return whole
    return None


def scores_digest(key: str, settings: EvalSettings, device: str) -> str:
    """Digest of everything that decides the scores of a model, by which the store has them.

    Args:
        key: identity of the model's content.
        settings: what to score, and how.
        device: as torch names it; its number format counts for the backend `hf`.
    """
    numbers = precision(device) if settings.backend == "hf" else settings.backend
    return store.digest([key, lm_eval.tasks_digest(settings), numbers])


def scored(weights: Mapping[str, float], entries: Mapping[str, ScoresEntry]) -> list[Scored]:
    """The models of an evaluation side by side, with their weighted mean, in the order of the tables.

    Raises:
        InputError: if a weight names a score that does not exist.
    """
    return [Scored.of(label, entry.content("model"), entry.evaluated, weights) for label, entry in entries.items()]
