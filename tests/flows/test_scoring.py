"""Scores from before a task's documents changed are computed again, so that models can be compared."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lewis import store
from lewis.errors import LewisError
from lewis.evaluation.step import ScoresEntry
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import Node, evaluations, graph
from lewis.store import kinds, remote
from lewis_flows import evaluate_elsewhere, scoring
from tests.support.models import parse


def recipe_of() -> Recipe:
    return parse(
        {"merge_method": "ties", "base_model": "org/base", "models": [{"model": "org/math"}]}
        | {"evaluate": {"tasks": ["sums", "words"], "baselines": ["base", "experts"]}}
    )


class Scorer:
    """Stands for a walk: finds scores in the store, else scores on the present documents of the task.

    Attributes:
        documents: task -> hashes of its present documents.
        scored: names of the nodes that were scored, in order.
    """

    def __init__(self, plan: Recipe) -> None:
        self.graph, self._names = graph(plan), evaluations(plan)
        self.futures = dict[str, Any]()
        self.documents = {"sums": ["a", "b"], "words": ["c"]}
        self.scored = list[str]()

    def go(self, nodes: Sequence[Node], results: Any = None, note: str = "") -> None:
        for node in nodes:
            digest = store.digest(node.name)
            path, found = kinds.SCORES.path(digest), "Cached"
            if store.entry(path, "results") is None:
                task = node.name.rpartition(" ")[2]
                store.write_entry(path, {"results": {task: 1}, "documents": {task: self.documents[task]}})
                found = "Completed"
                self.scored.append(node.name)
            entry = ScoresEntry(ref="m", digest=digest, path=path)
            self.futures[node.name] = SimpleNamespace(result=lambda of=entry: of, state=SimpleNamespace(name=found))

    def scores(self) -> dict[str, list[Any]]:
        return {label: [self.futures[name] for name in names] for label, names in self._names.items()}


@pytest.fixture
def scorer(home: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    monkeypatch.setattr(scoring, "finish", lambda *_: None)
    return Scorer(recipe_of())


def score(scorer: Scorer, queue: str = "") -> scoring.Judged:
    scorer.scored.clear()
    return scoring.score(scorer, recipe_of(), Path("r.yaml"), [], queue, None, "")  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
def test_scores_on_other_documents_are_computed_again_once(
    shared: bool, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No run of the recipe could compare its models any more; each failed at its end."""
    if shared:
        monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    score(scorer)
    assert len(scorer.scored) == 6 and not score(scorer).documents and scorer.scored == []
    scorer.documents["sums"] = ["a", "x"]
    merged = kinds.SCORES.path(store.digest("evaluate merged sums"))  # of a merge that is new
    merged.unlink()
    if shared:
        system, root = remote.opened()
        system.rm_file(f"{root}/scores/{merged.name}")
    judged = score(scorer)
    assert scorer.scored == ["evaluate merged sums", "evaluate base sums", "evaluate math sums"]
    assert {tuple(of[0].result().content("documents")["sums"]) for of in judged.scores.values()} == {("a", "x")}
    assert "the documents of sums changed after some models were scored" in caplog.text
    score(scorer)
    assert scorer.scored == []


def test_a_worker_that_keeps_scores_on_other_documents_is_named_by_its_files(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with a disk of its own may find them there again."""

    def of_worker(walk: Any, given: Any, *_: Any) -> None:
        nodes = _[-1]
        walk.go(nodes)
        scorer.documents["sums"] = ["a", "x"]
        walk.futures["evaluate merged sums"].result().path.unlink()
        walk.go([node for node in nodes if node.name == "evaluate merged sums"])
        scorer.documents["sums"] = ["a", "b"]

    monkeypatch.setattr(evaluate_elsewhere, "score", of_worker)
    with pytest.raises(LewisError, match=r"documents of sums changed .* remove .*scores/\w+.json.* on every machine"):
        score(scorer, "gpu")
