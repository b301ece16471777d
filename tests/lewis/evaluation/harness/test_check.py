"""The scores that tasks will give, and a wrong name in the gate, the weights or the search before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import InputError
from lewis.evaluation.harness.check import check_names
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.rehearsed import rehearsed
from tests.support.models import parse

pytestmark = pytest.mark.usefixtures("asked_here")
DATA: dict[str, Any] = {
    **{"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"},
    **{"doc_to_text": "q", "doc_to_target": "a"},
}
CHOICE: dict[str, Any] = {**DATA, "output_type": "multiple_choice", "doc_to_choice": ["x", "y"]}
CODE = "def score(doc, results):\n    return {'rouge': 1.0, 'all': 2}\n\ndef most(values):\n    return 1.0\n"
TASKS: dict[str, dict[str, Any]] = {
    "plain": {**CHOICE, "task": "plain"},
    "listed": {**CHOICE, "task": "listed", "metric_list": [{"metric": "acc"}, {"metric": "f1"}]},
    "filtered": {
        **{**DATA, "task": "filtered", "output_type": "generate_until", "doc_to_target": "{{a}}"},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": name, "filter": [{"function": "take_first"}]} for name in ("strict-match", "flexible")
        ],
    },
    "away": {**CHOICE, "task": "away", "dataset_path": "org/rows", "dataset_kwargs": None},
    "both": {
        **{"group": "both", "task": ["plain", "listed"]},
        "aggregate_metric_list": [{"metric": "acc", "filter_list": "none"}],
    },
    "changed": {"group": "changed", "task": [{"task": "plain", "metric_list": [{"metric": "f1"}]}]},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    for name, content in TASKS.items():
        write(folder, content, name)
    write(folder, {**CHOICE, "task": "code"}, "code", "process_results: !function code.score\n")
    away = {**TASKS["away"], "task": "away_code"}
    write(folder, away, "away_code", "process_results: !function code.score\n")
    (folder / "code.py").write_text(CODE)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"w{n}", "a": n % 2}) + "\n" for n in range(4)))
    return folder


def write(root: Path, config: dict[str, Any], name: str, more: str = "") -> None:
    (root / f"{name}.yaml").write_text(yaml.safe_dump(config) + more)


def scores(tasks: list[str], root: Path) -> dict[str, list[str] | None]:
    found = rehearsed(EvalSettings(tuple(tasks), root, allow_code_execution=True))
    return {name: None if of.scores is None else [row.name for row in of.scores] for name, of in found.items()}


def check(root: Path, tasks: list[str], gate: dict[str, Any] | None = None, **evaluate: Any) -> None:
    data = {"merge_method": "ties", "base_model": "a", "models": [{"model": "b"}]}
    data["evaluate"] = {"tasks": tasks, "allow_code_execution": True, **evaluate}
    if gate:
        data["register"] = {"name": "x", "gate": gate}
    recipe = parse(data, root)
    assert recipe.evaluate is not None
    check_names(recipe.evaluate, root, recipe.gate)


def test_scores_are_those_that_lm_eval_gives(root: Path) -> None:
    acc = ["acc,none", "acc_norm,none"]
    assert scores(["plain", "filtered", "code", "away", "away_code"], root) == {
        "plain": acc,
        "filtered": ["exact_match,strict-match", "exact_match,flexible"],
        "code": ["rouge,none", "all,none"],
        "away": acc,
        "away_code": None,  # its documents are needed to run its code
    }
    assert scores(["both"], root) == {"plain": acc, "listed": ["acc,none", "f1,none"], "both": ["acc,none"]}
    assert scores(["changed"], root) == {"plain": ["f1,none"], "changed": []}
    plain, away = (rehearsed(EvalSettings((name,), root))[name] for name in ("plain", "away"))
    assert (plain.documents, plain.dataset, away.documents, away.dataset) == (4, None, None, "org/rows")


@pytest.mark.parametrize(
    "gate, weights, expected",
    [
        ({"metric": "plain/acc"}, {}, r"register.gate.metric: .* 'plain/acc'; did you mean 'plain/acc,none'\?"),
        ({"metric": "plan/acc,none"}, {}, r"register.gate.metric: .*did you mean 'plain/acc,none'\?"),
        ({"metric": "plain"}, {}, "register.gate.metric: there is no score 'plain'"),
        ({"metric": "weighted/mean,none"}, {}, "register.gate.metric: there is no score 'weighted/mean,none'"),
        ({"metric": "plain/acc,none", "tolerance": {"listd": 0.1}}, {}, "register.gate.tolerance: .*'listd'"),
        (None, {"plain/acc_nrom,none": 1.0}, "evaluate.weights: .*did you mean 'plain/acc_norm,none'"),
    ],
)
def test_a_wrong_name_is_told(root: Path, gate: Any, weights: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check(root, ["plain", "listed"], gate, weights=weights)


@pytest.mark.parametrize(
    "task",
    [
        {"metric_list": [{"metric": "f1"}]},
        {"metric_list": [{"metric": "acc", "aggregation": "median"}]},
        {"group": "late", "task": ["listed"], "aggregate_metric_list": [{"metric": "f1", "filter_list": "none"}]},
        {"group": "late", "task": ["plain"]},
    ],
)
@pytest.mark.parametrize("key", ["tolerance", "weights"])
def test_a_score_without_a_value_per_document_is_refused_where_documents_are_compared(
    root: Path, task: dict[str, Any], key: str
) -> None:
    write(root, task if "group" in task else {**CHOICE, "task": "late", **task}, "late")
    named = {"plain": 0.1, "late": 0.1}
    gate = {"metric": "plain/acc,none", **({"tolerance": named} if key == "tolerance" else {})}
    with pytest.raises(InputError, match=f"{key}: there is no score with a value per document 'late'"):
        check(root, ["plain", "late"], gate, **({"weights": named} if key == "weights" else {}))


def test_a_group_gives_means_of_the_scores_that_its_tasks_have(root: Path) -> None:
    means = [{"metric": "acc"}, {"metric": "f1"}, {"metric": "bleu"}]
    for name, tasks in {"means": ["both"], "partly": ["both", "away_code"]}.items():
        write(root, {"group": name, "task": tasks, "aggregate_metric_list": means}, name)
    found = scores(["means", "partly"], root)
    assert found["means"] == ["acc,none", "f1,none"] and found["partly"] is None
    with pytest.raises(InputError, match="there is no score 'means/acc,nope'; did you mean 'means/acc,none'"):
        check(root, ["means"], {"metric": "means/acc,nope"})


def test_weights_of_scores_that_are_better_high_and_low_are_refused(root: Path) -> None:
    of_text = {**DATA, "output_type": "loglikelihood", "task": "text", "doc_to_target": "{{a}}"}  # perplexity, then acc
    own = {"metric": "acc", "higher_is_better": False}
    for task in (of_text, {**CHOICE, "task": "lower", "metric_list": [own]}):
        write(root, task, task["task"])
    tasks = ["plain", "text", "lower", "away_code", "both"]
    for mixed in (["plain", "text"], ["plain/acc_norm,none", "lower"], ["text/acc,none", "text"]):
        with pytest.raises(InputError, match=r"evaluate\.weights: some of these scores are better high, others low"):
            check(root, tasks, weights=dict.fromkeys(mixed, 1.0))
    for alike in (["plain", "text/acc,none", "away_code", "both"], ["text", "lower", "away_code/x/y,none"]):
        check(root, tasks, weights=dict.fromkeys(alike, 1.0))


def test_right_names_pass(root: Path) -> None:
    check(root, ["plain"], {"metric": "plain/acc,none", "tolerance": {"plain": 0.1, "plain/acc_norm,none": 0.2}})
    check(root, ["plain", "listed"], {"metric": "weighted/mean,none"}, weights={"plain": 1.0, "listed": 2.0})
    check(root, ["plain"], {"metric": "plain/acc,none", "tolerance": {"weighted": 0.1}}, weights={"plain": 1.0})
    check(root, ["away_code"], {"metric": "away_code/what it says,none"})
    check(root, ["changed"], {"metric": "plain/f1,none"})
