"""Score the models of a merge: on all documents, or look by look until the verdict is certain (`evaluate.stop`)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics import looks
from lewis.evaluation.statistics.scored import MERGED
from lewis.evaluation.step import furthest_look
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import CHAMPION, LOOK, MARK, evaluations, labels
from lewis_flows import evaluate_elsewhere
from lewis_flows.walk import Scores, Walk, finish, known, known_scores, submit
from lewis_tasks.register import find_mark, look


def score(
    walk: Walk,
    plan: Recipe,
    path: Path,
    overrides: list[str],
    queue: str,
    champion: PrefectFuture[Any] | None,
    tasks: str,
) -> tuple[Scores, int | None]:
    """Score the merged model, its parents and the champion, here or by workers of a queue.

    Returns:
        label -> scores, those of `mark` for the gate alone; and on how many documents of each task, None: on all.
    """
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
    documents = _first_look(plan, walk, current)
    if documents is None:
        return score_on(None, list(names)), None
    certain = False
    while documents and not certain:
        scores = score_on(documents, first)
        looked = submit(
            look, quote(plan), known(champion), known(walk.futures["merge experts"]), known_scores(scores), documents
        )
        finish(looked)
        certain, after = looked.result()
        documents = documents if certain else after
    rest = [label for label in names if label not in first] if certain else list(names)
    return score_on(documents, rest), documents


def _first_look(plan: Recipe, walk: Walk, current: Any) -> int | None:
    """After how many documents the gate looks first; None if it looks at all only."""
    assert plan.evaluate is not None
    if plan.evaluate.stop == "never" or plan.gate is None:
        return None
    merged = walk.futures["merge experts"].result()
    if current and current.digest == merged.digest:  # nothing is to be judged: what was scored is shown
        seed = merged.digest if plan.evaluate.documents == "by_release" else ""
        settings = replace(EvalSettings.of(plan.evaluate, plan.root), seed=seed)
        return furthest_look(MERGED, merged.digest, settings)
    return looks.FIRST
