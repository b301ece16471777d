"""The evaluation step: the scores of a model on a task, found in the store or computed once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from lewis import store
from lewis.devices import default_device, precision
from lewis.errors import InputError, LewisError
from lewis.evaluation import work_queue
from lewis.evaluation.harness import backends, lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.model_folder import check_tokenizer, loadable
from lewis.evaluation.statistics import looks
from lewis.evaluation.statistics.scored import MERGED, Scored
from lewis.evaluation.statistics.scores import Evaluated, Score
from lewis.models.source import ModelFiles
from lewis.progress import Report, silent
from lewis.store import kinds, outdated, remote
from lewis.store.outdated import Outdated
from lewis.store.reference import JsonReference, Reference


class ScoresEntry(JsonReference):
    """The store's entry with lm-eval's results of one model on one task, or on one group of tasks."""

    holds: ClassVar[str] = "results"
    ref: str


class ModelScores(Reference):
    """The scores of one model: an entry for each task of the recipe, in the recipe's order."""

    entries: tuple[ScoresEntry, ...] = Field(min_length=1)

    @property
    def ref(self) -> str:
        """The reference by which the scores name the model."""
        return self.entries[0].ref

    @property
    def model(self) -> str:
        """Identity of the model's content."""
        return str(self.entries[0].content("model"))

    @property
    def digest(self) -> str:
        """Identity of the scores."""
        digests = [entry.digest for entry in self.entries]
        return digests[0] if len(digests) == 1 else store.digest(digests)

    @property
    def content(self) -> dict[str, Any]:
        """The harness's results of all tasks, joined; read from the disk at each access.

        Raises:
            LewisError: if an entry is gone or damaged.
            InputError: as `joined_results`.
        """
        found = list[dict[str, Any]]()
        for entry in self.entries:
            if (of_task := store.read_entry(entry.path)) is None:
                raise LewisError(f"{entry.path} is gone or damaged; run again to make it")
            found.append(of_task)
        return joined_results(found)

    @property
    def evaluated(self) -> Evaluated:
        """Scores and samples of all tasks; read from the disk at each access."""
        return Evaluated.of(self.ref, self.content)

    @property
    def scores(self) -> list[Score]:
        """The scores, one per task and metric; read from the disk at each access."""
        return self.evaluated.scores

    @property
    def pools(self) -> dict[str, int]:
        """Task -> number of its documents, of which these scores may cover only a part."""
        content = self.content
        return {task: len(hashes) for task, hashes in content["documents"].items()} | content.get("pools", {})

    @property
    def part(self) -> str:
        """The part of the largest task's documents that these scores cover, such as `64 of 1319`; empty if all."""
        content, pools = self.content, self.pools
        largest = max(pools, key=lambda task: pools[task], default="")
        count, whole = len(content["documents"].get(largest, ())), pools.get(largest, 0)
        return f"{count} of {whole}" if count < whole else ""

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """Task -> the dataset of the Hub that its documents come from, as `child.evaluate` gives it, where known."""
        return dict(self.content.get("sources", {}))

    @property
    def shots(self) -> dict[str, int]:
        """Task -> how many examples its prompts had."""
        return dict(self.content.get("n-shot", {}))


def score(files: ModelFiles, settings: EvalSettings, *, device: str = "cpu", progress: Report = silent) -> ModelScores:
    """Score one model on all tasks of the settings, one after another; the rest is as of `score_task`."""
    each = settings.by_task()
    return ModelScores(entries=tuple(score_task(files, one, device=device, progress=progress) for one in each))


def score_task(
    files: ModelFiles, settings: EvalSettings, *, device: str = "cpu", progress: Report = silent
) -> ScoresEntry:
    """Scores of one model: found in the store, or computed once per model content, task and version of lm-eval.

    Args:
        files: of the model.
        settings: with one task.
        device: as torch names it.
        progress: called with the kind of requests that is running, how many are done, and how many there are.

    Raises:
        InputError: as `check_tokenizer`.
        LewisError: if the model is a merged one that is damaged, a file of the model or of a task changed meanwhile, or
            as `lm_eval.evaluate`.
    """
    digest = scores_digest(files.key, settings, device)
    path = kinds.SCORES.path(digest)
    with store.turn(kinds.SCORES, digest):
        if store.entry(path, "results") is None:
            files.check()
            whole = digest if settings.whole == settings else scores_digest(files.key, settings.whole, device)
            answers = kinds.ANSWERS.path(f"{whole}-{settings.batch_size}")
            store.make_folder(answers.parent)
            try:
                with loadable(files, whole=settings.backend != "hf") as (folder, adapter):
                    check_tokenizer(files.ref, [backends.tokenizer_of(folder, adapter)], settings)
                    found = lm_eval.evaluate(
                        folder,
                        settings,
                        adapter=adapter,
                        device=device,
                        answers=answers,
                        to_serve=files.ref in (MERGED, "champion"),
                        progress=progress,
                    )
            finally:  # else another model's answers would be taken for this one's
                store.discard_unless(files.check_unchanged, answers)
            if scores_digest(files.key, settings, device) != digest:
                raise LewisError(
                    f"evaluate: a file of {', '.join(settings.tasks)} changed while running, so the scores of "
                    f"{files.ref} are not kept; run again"
                )
            about = {"model": files.key, "ref": files.ref, "scored_as": scored_as(settings, device)}
            store.write_entry(path, {**about, **found.content})
            if settings.whole == settings:
                answers.unlink(missing_ok=True)
    return ScoresEntry(ref=files.ref, digest=digest, path=path)


def find_scores(ref: str, key: str, settings: EvalSettings, device: str = "cpu") -> ModelScores | None:
    """The scores of a model on all tasks, if the store has them."""
    found = [find_score(ref, key, each, device) for each in settings.by_task()]
    entries = tuple(entry for entry in found if entry)
    return ModelScores(entries=entries) if len(entries) == len(found) else None


def furthest_look(ref: str, key: str, settings: EvalSettings) -> int | None:
    """The number of documents of the largest look for which the store has a model's scores on each task.

    It is None if the store has the scores on all documents, or none of the first look. A run goes from look to look, so
    the store has all looks before the largest one. Each task may have been scored on another device.
    """

    def has(look: int | None) -> bool:
        tasks, devices = replace(settings, look=look).by_task(), scoring_devices()
        return all(any(find_score(ref, key, task, device) for device in devices) for task in tasks)

    if has(None) or not has(looks.FIRST):
        return None
    size = looks.FIRST
    while has(2 * size):
        size *= 2
    return size


def find_score(ref: str, key: str, settings: EvalSettings, device: str) -> ScoresEntry | None:
    """The scores of a model on one task, if the store has them."""
    digest = scores_digest(key, settings, device)
    path = kinds.SCORES.path(digest)
    return None if store.entry(path, "results") is None else ScoresEntry(ref=ref, digest=digest, path=path)


def documents_differ(of_task: Sequence[ScoresEntry]) -> bool:
    """Whether the scores of models on one task are not all of the same documents.

    The key of scores holds no documents from the Hub or another URL, so scores from before these changed are found.
    """
    contents = [each.content("documents") for each in of_task]
    known = [{task: sorted(hashes) for task, hashes in documents.items()} for documents in contents]
    return any(documents != known[0] for documents in known[1:])


def remove_scores(entries: Sequence[ScoresEntry]) -> None:
    """Remove scores from this machine's store and from the remote one, so that they are computed again.

    Raises:
        TransientError: if the remote half does not answer.
    """
    for entry in entries:
        if remote.shares(entry.path):
            key = f"{kinds.SCORES.name}/{entry.digest}"
            outdated.remove(Outdated("remote store", key[:24], key, math.inf))
        store.discard(entry.path)


def scoring_devices() -> tuple[str, ...]:
    """The devices whose scores are looked up in the store: this machine's, or GPU and CPU.

    It is both if evaluations have a work queue of their own: its workers may have a GPU where this machine has none.
    """
    return ("cuda", "cpu") if work_queue.queue() else (default_device(),)


def find_comparable(ref: str, key: str, other: str, settings: EvalSettings) -> list[ScoresEntry] | None:
    """The scores of a model on each task, in the number format of another model's scores; None if one is missing.

    Args:
        ref, key: of the model.
        other: key of the other one, which was scored with these settings.
        settings: of both. If they have a look that the model was not scored on, its scores on all documents are taken.
    """
    found = list[ScoresEntry]()
    for task in settings.by_task():
        devices = (device for device in scoring_devices() if find_score("", other, task, device))
        tried = (find_score(ref, key, each, device) for device in devices for each in (task, replace(task, look=None)))
        if (entry := next(filter(None, tried), None)) is None:
            return None
        found.append(entry)
    return found


def find_all_scores(models: Mapping[str, tuple[str, str]], settings: EvalSettings) -> dict[str, ScoresEntry] | None:
    """The scores of all models on one task, in one number format so that they can be compared; None if one is missing.

    Args:
        models: name -> reference and key of a model.
        settings: with one task.
    """
    for device in scoring_devices():
        found = {label: find_score(ref, key, settings, device) for label, (ref, key) in models.items()}
        whole = {label: entry for label, entry in found.items() if entry}
        if len(whole) == len(models):
            return whole
    return None


def scores_digest(key: str, settings: EvalSettings, device: str) -> str:
    """Digest of everything that decides the scores of a model on a task: the key of these scores in the store.

    Args:
        key: identity of the model's content.
        settings: what to score, and how; with one task.
        device: as torch names it; its number format counts for the backend `hf`.
    """
    return store.digest([key, *_apart_from_the_model(settings, device)])


def scored_as(settings: EvalSettings, device: str) -> str:
    """Digest of everything but the model that decides scores: two models' scores with equal digests can be compared."""
    return store.digest(_apart_from_the_model(settings, device))


def _apart_from_the_model(settings: EvalSettings, device: str) -> list[str]:
    numbers = precision(device) if settings.backend == "hf" else settings.backend
    return [lm_eval.tasks_digest(settings), numbers]


def joined_results(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the harness's results of several tasks, as if it had scored them in one call.

    A task that is listed alone and in a group, too, has the results of the first of the two. For the guards, each task
    counts the same: the perplexity is the geometric mean of the tasks' perplexities.

    Raises:
        InputError: if such a task was scored with other settings in the group.
    """
    if len(contents) == 1:
        return dict(contents[0])
    _check_repeated(contents)
    found: dict[str, Any] = {"samples": [], "results": {}}
    kept = ("n-shot", "versions", "documents", "prompts", "groups", "sources", "texts", "requests", "pools")
    for key in ("higher_is_better", *kept):
        found[key] = _first([each.get(key, {}) for each in contents])
    results, groups = _first([each["results"] for each in contents]), found["groups"]
    for last in (False, True):  # lm-eval has tasks first, then groups
        found["results"] |= {name: value for name, value in results.items() if (name in groups) is last}
    seen = set[tuple[str, str]]()
    for sample in (sample for each in contents for sample in each["samples"]):
        if (place := (sample["task"], sample["metric"])) not in seen:
            seen.add(place)
            found["samples"].append(sample)
    ends = [each["ends"] for each in contents]
    known = [each["perplexity"] for each in ends if each["perplexity"] is not None]
    found["ends"] = {
        "empty": _first([each["empty"] for each in ends]),
        "tried": sum(each["tried"] for each in ends),
        "ended": sum(each["ended"] for each in ends),
        "perplexity": float(np.exp(np.mean(np.log(known)))) if known else None,
    }
    return found


def _first(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All items of several mappings; of a name that is in several, the first value."""
    found: dict[str, Any] = {}
    for each in mappings:
        for name, value in each.items():
            found.setdefault(name, value)
    return found


def _check_repeated(contents: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError if two contents have a task in common that was scored with other settings in each."""
    seen = dict[tuple[str, str | int, bool], Any]()
    for place, value in (item for each in contents for item in _asked(each)):
        if seen.setdefault(place, value) != value:
            task = place[0]
            raise InputError(
                f"evaluate.tasks: {task} is there twice, alone or in groups, with other prompts, documents, metrics or "
                f"number of examples (`num_fewshot`); leave one out, or give {task} another name in the group"
            )


def _asked(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str | int, bool], Any]]:
    """What the scores of a task depend on, as far as the harness kept it.

    Each has the task, a name or a document, and whether only a part of the documents was scored: the scores of the mark
    may be of a part for one task, and of all documents for another.
    """
    part = "pools" in content
    for key in ("n-shot", "documents"):
        yield from (((task, key, part), value) for task, value in content.get(key, {}).items())
    for task, results in content["results"].items():
        yield (task, "metrics", part), {name for name in results if "," in name}
    for task, texts in content.get("texts", {}).items():
        yield from (((task, each["document"], part), each["prompt"]) for each in texts)


def scored_models(weights: Mapping[str, float], scores: Mapping[str, ModelScores]) -> list[Scored]:
    """Read the scores of several models from the store, and add the weighted mean to each.

    Args:
        weights: `evaluate.weights`; empty: no mean is added.
        scores: label -> scores of the model.

    Returns:
        The models in the order of `scores`.

    Raises:
        LewisError: as `ModelScores.content`.
        InputError: if a weight names a score that does not exist.
    """
    return [Scored.of(label, each.model, each.evaluated, weights) for label, each in scores.items()]
