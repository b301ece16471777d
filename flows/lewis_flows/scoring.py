"""Score the models of a merge: on all documents, or look by look until the verdict is certain (`evaluate.stop`)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from lewis.errors import LewisError
from lewis.evaluation.statistics import looks
from lewis.evaluation.statistics.scored import MERGED, without_mark
from lewis.evaluation.step import documents_differ, remove_scores
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import CHAMPION, LOOK, MARK, Node, evaluations, labels, look_to_show
from lewis_flows import evaluate_elsewhere
from lewis_flows.walk import Scores, Walk, finish, known, known_scores, submit
from lewis_tasks.register import find_mark, look

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """The scores that the gate judges.

    Attributes:
        scores: label -> scores, those of `mark` for the gate alone.
        documents: of each task that were scored; None: all.
        on_all: scores the models that tables show on all documents; None if that is done, or not wanted.
    """

    scores: Scores
    documents: int | None = None
    on_all: Callable[[], Scores] | None = None


def score(
    walk: Walk,
    plan: Recipe,
    path: Path,
    overrides: list[str],
    queue: str,
    champion: PrefectFuture[Any] | None,
    tasks: str,
) -> Judged:
    """Score the merged model, its parents and the champion, here or by workers of a queue."""
    current = champion.result() if champion else None
    walk.futures |= {CHAMPION: champion} if champion else {}
    results = {CHAMPION: current.files("champion") if current else None}
    if plan.register_as and MARK in labels(plan).values():
        walk.futures[MARK] = mark = submit(find_mark, plan.register_as.model)
        finish(mark)
        marked = mark.result()
        results[MARK] = marked.files("mark") if marked else None
    names, on = evaluations(plan), dict[str, int | None]()

    def go(documents: int | None, nodes: Sequence[Node], note: str = "") -> Scores:
        given = {**results, LOOK: documents}
        if queue:
            evaluate_elsewhere.score(walk, given, queue, plan, path.stem, overrides, tasks, nodes)
        else:
            walk.go(nodes, given, (f", {documents} documents" if documents else "") + note)
        scores = walk.scores()
        finish(*(each for of_model in scores.values() for each in of_model))
        return scores

    def score_on(documents: int | None, labels: Sequence[str]) -> Scores:
        scores = go(documents, [walk.graph[name] for label in labels for name in names[label]])
        on.update(dict.fromkeys(labels, documents))
        compared = [label for label in scores if label in on and on[label] == documents]
        if changed := _on_other_documents(scores, compared):
            for number, task in changed.items():
                _forget(task, [scores[label][number] for label in compared], all_of_them=bool(queue))
            scores = go(documents, [walk.graph[names[label][n]] for n in changed for label in compared], ", again")
            for number, task in _on_other_documents(scores, compared).items():
                paths = ", ".join(str(scores[label][number].result().path) for label in compared)
                raise LewisError(
                    f"evaluate: the documents of {task} changed after some models were scored, and are not the same "
                    f"after these were scored again; remove {paths} on every machine that scores, and run again"
                )
        return scores

    first = [label for label in names if label in ("base", "champion", "mark", MERGED)]
    if "base" not in names and not current:  # the gate compares with the best expert
        first = list(names)
    looks_early = plan.evaluate is not None and plan.evaluate.stop != "never" and plan.gate is not None
    documents = _first_look(plan, walk, current) if looks_early else None
    if documents is None:  # if looks are taken, the champion is shown, and nothing is judged
        return Judged(score_on(None, list(without_mark(names) if looks_early else names)))
    certain = False
    while documents and not certain:
        scores = score_on(documents, first)
        merged = known(walk.futures["merge experts"])
        looked = submit(look, quote(plan), known(champion), merged, known_scores(scores), documents)
        finish(looked)
        certain, after = looked.result()
        documents = documents if certain else after
    rest = [label for label in names if label not in first] if certain else list(names)
    scores = score_on(documents, rest)
    wanted = documents and plan.evaluate and plan.evaluate.full_scores == "promoted"
    return Judged(scores, documents, (lambda: score_on(None, list(without_mark(names)))) if wanted else None)


def _on_other_documents(scores: Scores, labels: Sequence[str]) -> dict[int, str]:
    """The tasks on which models were not scored on the same documents: place in the recipe's list -> task.

    Args:
        labels: of the models that are compared with each other.
    """
    of_models = [[each.result() for each in scores[label]] for label in labels]
    of_tasks = list(zip(*of_models, strict=True))
    return {n: ", ".join(of[0].content("documents")) for n, of in enumerate(of_tasks) if documents_differ(of)}


def _forget(task: str, futures: Sequence[PrefectFuture[Any]], *, all_of_them: bool) -> None:
    """Remove the scores of a task that this run has found: those that it computed are of the present documents."""
    found = [] if all_of_them else [each for each in futures if each.state.name == "Cached"]
    logger.warning(
        "the documents of %s changed after some models were scored: these are scored again, as scores are compared "
        "document by document",
        task,
    )
    remove_scores([each.result() for each in found or futures])


def _first_look(plan: Recipe, walk: Walk, current: Any) -> int | None:
    """Return how many documents the first look takes; None: the merge is the champion's, shown on all documents."""
    digest = walk.futures["merge experts"].result().digest
    return look_to_show(plan, digest, digest) if current and current.digest == digest else looks.FIRST
