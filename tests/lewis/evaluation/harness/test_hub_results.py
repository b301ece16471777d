"""Scores in the form that the Hub reads next to a card, as its own client writes them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.evaluation.harness import rehearsed as module
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.rehearsed import rehearsed
from lewis.evaluation.hub_results import hub_results
from lewis.evaluation.statistics.scored import WEIGHTED
from lewis.evaluation.statistics.scores import Score
from lewis.recipe.recipe import Recipe
from tests.support.models import parse

pytestmark = pytest.mark.usefixtures("asked_here")
KEYS = "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: 0\ndoc_to_choice: [x, z]\n"
TASK = f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: x.jsonl}}}}\n{KEYS}"
HUB = f"task: own\ndataset_path: org/data\n{KEYS}"
SCORES = [
    Score("gsm8k", "exact_match,strict-match", 0.25, 0.02, True, 100),
    Score("gsm8k", "exact_match,flexible-extract", 0.5, 0.02, True, 100),
    Score("own", "acc,none", 0.75, 0.02, True, 10),
]


def asked(recipe: Recipe) -> Recipe:
    """The same recipe, whose tasks were checked before its run."""
    assert recipe.evaluate
    (recipe.root / "x.jsonl").write_text('{"q": "w1"}\n' * 6)
    rehearsed(EvalSettings.of(recipe.evaluate, recipe.root))
    return recipe


def results_of(recipe: Recipe, scores: list[Score]) -> str:
    return hub_results(recipe.evaluate, recipe.root, recipe.gate_metric, scores)


def told(folder: Path, **evaluate: Any) -> Any:
    (folder / "own.yaml").write_text(TASK)
    models = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}]}
    scored = {"evaluate": {"tasks": ["gsm8k", "own.yaml"], "num_fewshot": 5, **evaluate}}
    gate = {"register": {"name": "m", "gate": {"metric": "gsm8k/exact_match,flexible-extract"}}}
    return yaml.safe_load(results_of(asked(parse({**models, **scored, **gate}, root=folder)), SCORES))


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval_tasks")
def test_a_task_of_a_dataset_of_the_hub_has_one_entry(tmp_path: Path) -> None:
    (entry,) = told(tmp_path)
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 0.5
    assert entry["notes"].startswith("lm-eval ") and entry["notes"].endswith(", exact_match,flexible-extract, 5-shot")


def test_an_entry_names_the_commit_of_its_documents_and_the_page_of_the_scores(tmp_path: Path) -> None:
    (tmp_path / "hub.yaml").write_text(HUB)
    models = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}]}
    recipe = asked(parse({**models, "evaluate": {"tasks": ["hub.yaml"]}}, root=tmp_path))
    for revisions, page, wanted in (
        ({"own": "1" * 40}, "https://mlflow/#/models/m", {"revision": "1" * 40}),
        ({"other": "1" * 40}, "", {}),
    ):
        text = hub_results(recipe.evaluate, recipe.root, None, [SCORES[2]], revisions, page)
        (entry,) = yaml.safe_load(text)
        assert entry["dataset"] == {"id": "org/data", "task_id": "own", **wanted}
        assert entry.get("source") == ({"url": page} if page else None)
        assert hub_results(recipe.evaluate, recipe.root, None, [SCORES[2]], part="64 of 100") == ""


def test_a_task_that_fixes_its_examples_is_noted_with_those(tmp_path: Path) -> None:
    (tmp_path / "hub.yaml").write_text(HUB)
    models = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}]}
    recipe = asked(parse({**models, "evaluate": {"tasks": ["hub.yaml"], "num_fewshot": 5}}, root=tmp_path))
    for shots, noted in (({"own": 0}, "0-shot"), ({}, "5-shot")):
        (entry,) = yaml.safe_load(hub_results(recipe.evaluate, recipe.root, None, [SCORES[2]], shots=shots))
        assert entry["notes"].endswith(f", acc,none, {noted}")


def test_tasks_of_the_recipe_do_not_read_those_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.builtin_tasks, "index", lambda: pytest.fail("read"))
    (tmp_path / "own.yaml").write_text(TASK)
    models = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}]}
    recipe = asked(parse({**models, "evaluate": {"tasks": ["own.yaml"]}}, root=tmp_path))
    assert results_of(recipe, [SCORES[2], Score(*WEIGHTED, 0.5, 0.1, True, 10)]) == ""


@pytest.mark.parametrize("part", [{"limit": 10}, {"documents": "confirm"}])
def test_a_part_of_the_documents_is_not_told(tmp_path: Path, part: dict[str, Any]) -> None:
    assert told(tmp_path, **part) is None
