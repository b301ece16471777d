"""Score the models of a merge: on all documents, or look by look until the verdict is certain (`evaluate.stop`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from lewis.evaluation.statistics import looks
from lewis.evaluation.statistics.scored import MERGED, shown
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import CHAMPION, LOOK, MARK, evaluations, labels, look_to_show
from lewis_flows import evaluate_elsewhere
from lewis_flows.walk import Scores, Walk, finish, known, known_scores, submit
from lewis_tasks.register import find_mark, look


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
    names = evaluations(plan)

    def score_on(documents: int | None, labels: Sequence[str]) -> Scores:
        nodes = [walk.graph[name] for label in labels for name in names[label]]
        given = {**results, LOOK: documents}
        if queue:
            evaluate_elsewhere.score(walk, given, queue, plan, path.stem, overrides, tasks, nodes)
        else:
            walk.go(nodes, given, f", {documents} documents" if documents else "")
        scores = walk.scores()
        finish(*(each for of_model in scores.values() for each in of_model))
        return scores

    first = [label for label in names if label in ("base", "champion", "mark", MERGED)]
    if "base" not in names and not current:  # the gate compares with the best expert
        first = list(names)
    looks_early = plan.evaluate is not None and plan.evaluate.stop != "never" and plan.gate is not None
    documents = _first_look(plan, walk, current) if looks_early else None
    if documents is None:  # if looks are taken, the champion is shown, and nothing is judged
        return Judged(score_on(None, list(shown(names) if looks_early else names)))
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
    return Judged(scores, documents, (lambda: score_on(None, list(shown(names)))) if wanted else None)


def _first_look(plan: Recipe, walk: Walk, current: Any) -> int | None:
    """Return how many documents the first look takes; None: the merge is the champion's, shown on all documents."""
    digest = walk.futures["merge experts"].result().digest
    return look_to_show(plan, digest, digest) if current and current.digest == digest else looks.FIRST
