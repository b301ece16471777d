"""The scores that tasks will give, and a wrong name in the gate, the weights or the search before any work."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import InputError
from lewis.evaluation.harness import builtin_tasks, task_metrics
from lewis.evaluation.harness.builtin_tasks import Builtin
from lewis.evaluation.harness.task_metrics import Known, check_names, configs_and_scores
from lewis.evaluation.statistics.scores import SUMMED
from tests.support.models import parse

CHOICE: dict[str, Any] = {"dataset_path": "json", "output_type": "multiple_choice"}
TASKS: dict[str, dict[str, Any]] = {
    "plain": {**CHOICE, "task": "plain"},
    "listed": {**CHOICE, "task": "listed", "metric_list": [{"metric": "acc"}, {"metric": "f1"}]},
    "filtered": {
        **{"task": "filtered", "dataset_path": "json", "output_type": "generate_until"},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "strict-match", "filter": []}, {"name": "flexible", "filter": []}],
    },
    "code": {**CHOICE, "task": "code", "process_results": "os.path"},
    "own": {**CHOICE, "task": "own", "metric_list": [{"metric": "os.path.join"}]},
    "both": {
        **{"group": "both", "task": ["plain", "listed"]},
        "aggregate_metric_list": [{"metric": "acc", "filter_list": "none"}],
    },
    "all": {"group": "all", "task": ["plain"], "aggregate_metric_list": [{"metric": "acc"}]},
    "changed": {"group": "changed", "task": [{"task": "plain", "metric_list": [{"metric": "f1"}]}]},
}


def known_scores(tasks: list[str], root: Path) -> Known | None:
    found = configs_and_scores(tasks, root)
    return None if found is None else {name: scores for name, (_, scores) in found.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_scores_are_known_from_the_files(root: Path) -> None:
    assert known_scores(["plain", "listed", "filtered"], root) == {
        "plain": ["acc,none", "acc_norm,none"],
        "listed": ["acc,none", "f1,none"],
        "filtered": ["exact_match,strict-match", "exact_match,flexible"],
    }
    both = known_scores(["both"], root)
    assert both and both["both"] == ["acc,none"] and list(both) == ["both", "plain", "listed"]
    assert known_scores(["code", "own", "all"], root) == {
        **{"code": None, "own": None, "all": ["acc,none"]},
        "plain": ["acc,none", "acc_norm,none"],
    }
    assert known_scores(["changed"], root) is None


def test_lm_evals_own_are_known_too(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump({**CHOICE, "task": "theirs"}))
    (tmp_path / "group.yml").write_text("group: group\ntask: [theirs]\n")
    index = {
        "theirs": Builtin("TASK", str(tmp_path / "theirs.yml"), ()),
        "group": Builtin("GROUP", str(tmp_path / "group.yml"), ()),
        "tag": Builtin("TAG", None, ("theirs",)),
    }
    monkeypatch.setattr(builtin_tasks, "index", lambda: index)
    scores = ["acc,none", "acc_norm,none"]
    assert known_scores(["group", "tag"], root) == {"group": [], "tag": [], "theirs": scores}


def check(root: Path, tasks: list[str], gate: dict[str, Any] | None = None, **evaluate: Any) -> None:
    data = {"merge_method": "ties", "base_model": "a", "models": [{"model": "b"}]}
    data["evaluate"] = {"tasks": tasks, **evaluate}
    if gate:
        data["register"] = {"name": "x", "gate": gate}
    recipe = parse(data, root)
    assert recipe.evaluate is not None
    check_names(recipe.evaluate, root, recipe.gate)


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
        {"metric_list": [{"metric": "bleu"}]},
        {"metric_list": [{"metric": "acc", "aggregation": "median"}]},
        {"group": "late", "task": ["plain"], "aggregate_metric_list": [{"metric": "f1", "filter_list": "none"}]},
        {"group": "late", "task": ["plain"]},
    ],
)
@pytest.mark.parametrize("key", ["tolerance", "weights"])
def test_a_score_without_a_value_per_document_is_refused_where_documents_are_compared(
    root: Path, task: dict[str, Any], key: str
) -> None:
    (root / "late.yaml").write_text(yaml.safe_dump(task if "group" in task else {**CHOICE, "task": "late", **task}))
    named = {"plain": 0.1, "late": 0.1}
    gate = {"metric": "plain/acc,none", **({"tolerance": named} if key == "tolerance" else {})}
    with pytest.raises(InputError, match=f"{key}: there is no score with a value per document 'late'"):
        check(root, ["plain", "late"], gate, **({"weights": named} if key == "weights" else {}))


def test_a_group_gives_means_of_the_scores_that_its_tasks_have(root: Path) -> None:
    means = [{"metric": "acc", "filter_list": ["none", "nope"]}, {"metric": "f1"}, {"metric": "bleu"}]
    for name, tasks in {"means": ["both"], "partly": ["both", "code"]}.items():
        group = {"group": name, "task": tasks, "aggregate_metric_list": means}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(group))
    known = known_scores(["means", "partly"], root)
    assert known and known["means"] == ["acc,none", "f1,none"] and known["partly"] is None
    with pytest.raises(InputError, match="there is no score 'means/acc,nope'; did you mean 'means/acc,none'"):
        check(root, ["means"], {"metric": "means/acc,nope"})


def test_weights_of_scores_that_are_better_high_and_low_are_refused(root: Path) -> None:
    of_text = {"dataset_path": "json", "output_type": "loglikelihood", "task": "text"}  # perplexity, then acc
    own = {"metric": "acc", "higher_is_better": False}
    for name, task in {"text": of_text, "lower": {**CHOICE, "task": "lower", "metric_list": [own]}}.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(task))
    tasks = ["plain", "text", "lower", "code", "both"]
    for mixed in (["plain", "text"], ["plain/acc_norm,none", "lower"], ["text/acc,none", "text"]):
        with pytest.raises(InputError, match=r"evaluate\.weights: some of these scores are better high, others low"):
            check(root, tasks, weights=dict.fromkeys(mixed, 1.0))
    for alike in (["plain", "text/acc,none", "code", "both"], ["text", "lower", "code/x/y,none", "both"]):
        check(root, tasks, weights=dict.fromkeys(alike, 1.0))


def test_the_metrics_that_have_no_value_per_document_are_lm_evals() -> None:
    from lm_eval.api import metrics, registry

    summed = [getattr(metrics, name) for name in SUMMED]
    metric_names = registry.metric_registry
    found = {name for name in metric_names if registry.get_metric_aggregation(name) not in summed}
    assert found == task_metrics.AGGREGATED


def test_right_names_pass(root: Path) -> None:
    check(root, ["plain"], {"metric": "plain/acc,none", "tolerance": {"plain": 0.1, "plain/acc_norm,none": 0.2}})
    check(root, ["plain", "listed"], {"metric": "weighted/mean,none"}, weights={"plain": 1.0, "listed": 2.0})
    check(root, ["plain"], {"metric": "plain/acc,none", "tolerance": {"weighted": 0.1}}, weights={"plain": 1.0})
    own = {"metric_list": [{"metric": "acc", "aggregation": "own.mean"}]}
    (root / "own_mean.yaml").write_text(yaml.safe_dump({**CHOICE, "task": "own_mean", **own}))
    check(root, ["own_mean"], {"metric": "own_mean/acc,none", "tolerance": {"own_mean": 0.1}})
    check(root, ["code"], {"metric": "code/what it says,none"})
    check(root, ["changed"], {"metric": "plain/f1,none"})
