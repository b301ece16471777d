"""What a plan says of a gate: what its documents will show, where their number is known before the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lewis.evaluation.outlook import outlook
from lewis.evaluation.statistics import power
from lewis.evaluation.statistics.comparison import mcnemar, tango
from lewis.recipe.schema import Evaluate, Gate

pytestmark = pytest.mark.usefixtures("asked_here")
TASK = {
    **{"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}}, "test_split": "test"},
    **{"task": "sums", "output_type": "generate_until", "doc_to_text": "q", "doc_to_target": "a"},
}
AWAY = {"dataset_path": "org/odd", "dataset_kwargs": None}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    for name, more in (("sums", {}), ("words", {}), ("odd", AWAY)):
        write(folder, name, more)
    (folder / "sums.jsonl").write_text('{"q": "w1", "a": "w2"}\n' * 200 + "\n")
    write(folder, "loss", {"metric_list": [{"metric": "exact_match", "higher_is_better": False}]})
    write(folder, "nats", {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]})
    return folder


def write(root: Path, name: str, more: dict[str, Any], code: str = "") -> None:
    (root / f"{name}.yaml").write_text(yaml.safe_dump({**TASK, "task": name, **more}) + code)


def said(root: Path, gate: dict[str, Any], *tasks: str, **more: Any) -> list[str]:
    names = [f"{task}.yaml" for task in tasks]
    return outlook(Gate(**gate), Evaluate(tasks=names, allow_code_execution=True, **more), root)


def test_margins_follow_from_the_documents_and_the_number_of_tests(root: Path) -> None:
    one = "sums: 200 documents, margin 0.065: an equal version passes 90%, a loss of 0.047 is refused 8 times in 10"
    assert said(root, {"metric": "sums/acc,none"}, "sums") == ["not_worse", one]
    weights = {"weights": {"sums": 1, "words/acc,none": 1}}
    _, *lines = said(root, {"metric": "weighted/mean,none"}, "sums", "words", **weights)
    assert [line.split(":")[0] for line in lines] == ["sums", "words", "weighted/mean,none, margin 0.055"]
    weights = {"weights": {"sums/acc,none": 1, "sums/f1,none": 1}}
    assert said(root, {"metric": "weighted/mean,none"}, "sums", **weights)[-1].startswith(
        "weighted/mean,none, margin 0.073"
    )
    given = said(root, {"metric": "sums/acc,none", "tolerance": {"sums": 0.02}}, "sums")[1]
    assert "margin 0.02: an equal version passes 23%, a loss of 0.002 is refused" in given
    both = said(root, {"metric": "sums/acc,none", "tolerance": {"sums": 0.02, "sums/acc,none": 0.05}}, "sums")[1]
    assert "margin 0.05:" in both
    small = said(root, {"metric": "sums/acc,none", "tolerance": 0.01}, "sums")[1]
    assert small.endswith("an equal version passes 12%, it needs a larger register.gate.tolerance")


def test_where_the_number_is_not_known_nothing_is_said_but_by_the_limit(root: Path) -> None:
    assert said(root, {"metric": "odd/acc,none"}, "odd", "loss", "nats") == ["not_worse"]
    _, warning, line = said(root, {"metric": "odd/acc,none"}, "odd", "loss", limit=50)
    assert warning == "evaluate.limit is 50: no run can promote; set register.gate.allow_limit: true"
    assert line.startswith("odd: 50 documents, margin 0.1: an equal version passes 7")
    _, line = said(root, {"metric": "sums/acc,none", "allow_limit": True}, "sums", limit=0.1)
    assert line.startswith("sums: 20 documents")


def test_a_task_that_cannot_be_judged_is_named_and_counts_as_no_test(root: Path) -> None:
    (root / "utils.py").write_text(
        "def median(values):\n    return 1.0\n\ndef f1(doc, results):\n    return {'f1': 1}\n"
    )
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["w1", "w2"]}
    lists = {
        "cola": {**choice, "metric_list": [{"metric": "mcc"}]},
        "own": {"metric_list": [{"metric": "exact_match", "aggregation": "median"}]},
        "some": {"metric_list": [{"metric": "bleu"}, {"metric": "exact_match"}]},
        "code": {"metric_list": [{"metric": "f1", "aggregation": "mean"}]},
    }
    for name, more in lists.items():
        write(root, name, more, "process_results: !function utils.f1\n" * (name == "code"))
    lines = said(root, {"metric": "sums/acc,none"}, "sums", *lists)
    assert [line for line in lines if "judged" in line] == [
        f"{name} is not judged: none of its scores has a value per document" for name in ("cola", "own")
    ]
    three = said(root, {"metric": "sums/acc,none"}, "sums", "some", "code")
    assert lines[1] == three[1] and "margin" in lines[1]
    assert not any(line.startswith("own: 200 documents") for line in lines)


def test_where_scoring_may_end_early_and_which_documents_are_drawn(root: Path) -> None:
    _, line, ends, after = said(root, {"metric": "sums/acc,none"}, "sums", stop="known")
    assert after == "what passes early is scored on all documents after its promotion"
    _, line, ends = said(root, {"metric": "sums/acc,none"}, "sums", stop="known", full_scores="never")
    assert "an equal version passes 88%" in line  # four fifths of the error are left for all documents
    assert ends == "scoring ends after 32, 64, 128 documents of each task, if the verdict is certain"
    _, line, ends = said(root, {"metric": "sums/acc,none"}, "sums", stop="worse")
    assert "an equal version passes 90%" in line and ends.endswith("if the verdict is certain to be no")
    _, line = said(root, {"metric": "sums/acc,none"}, "sums", documents="by_release", limit=50)
    assert line.startswith("sums: 50 documents")  # no word of allow_limit


def test_a_gain_needs_more_the_more_versions_were_compared_before(root: Path) -> None:
    line = "sums: 200 documents, a gain of 0.085 is seen 8 times in 10, of 0.15 by the 10th version in a row"
    assert said(root, {"metric": "sums/acc,none", "policy": "better"}, "sums") == ["better", line]
    assert "a gain of 0.13 is seen 8 times in 10" in said(root, {"metric": "sums/acc,none", "min_gain": 0.1}, "sums")[1]


def test_a_gain_is_asked_of_the_task_of_the_metric_not_of_one_whose_name_begins_alike(root: Path) -> None:
    write(root, "sum", {})
    _, first, second = said(root, {"metric": "sums/acc,none", "policy": "better"}, "sum", "sums")
    assert first.startswith("sum: 200 documents, margin 0.065:") and second.startswith("sums: 200 documents, a gain")


def test_a_task_whose_gain_is_asked_for_needs_no_margin_also_where_its_documents_are_not_known(root: Path) -> None:
    _, line = said(root, {"metric": "odd/acc,none", "policy": "better"}, "odd", "sums")
    assert line.startswith("sums: 200 documents, margin 0.065:")


def test_who_is_asked_about_what_passes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = {"metric": "odd/acc,none", "judge": {"model": "wise"}, "approve": True, "approve_hours": 2}
    wise, person = "what passes is shown to the judge wise at", "what passes waits up to 2 hours for a person"
    assert said(root, asks, "odd") == ["not_worse", f"{wise} LEWIS_JUDGE, which is not set here", person]
    monkeypatch.setenv("LEWIS_JUDGE", "http://me:secret@judge/v1")
    assert "secret" not in (shown := said(root, asks, "odd")[1]) and shown.startswith(f"{wise} http://")


@pytest.mark.parametrize(("documents", "number"), [(200, 1), (1000, 1), (1000, 10)])
def test_what_a_plan_says_holds_in_four_cases_of_five(documents: int, number: int) -> None:
    spread, rng = power.spread([(1.0, documents)]), np.random.default_rng(11)
    margin = power.margin(spread)

    def drawn(gain: float) -> list[list[int]]:
        changed = power.CHANGED + abs(gain)
        chances = [(changed + gain) / 2, (changed - gain) / 2, 1 - changed]
        return [[int(n) for n in row[:2]] for row in rng.multinomial(documents, chances, size=2000)]

    equal = np.mean([tango(*pair, documents, margin) <= power.ERROR for pair in drawn(0.0)])
    refused = np.mean([tango(*p, documents, margin) > power.ERROR for p in drawn(-power.loss_seen(margin, spread))])
    least = 0.1
    reached = [(w - b) / documents >= least for w, b in drawn(power.gain_seen(spread, number, least))]
    assert 0.75 < np.mean(reached) < 0.85 and power.gain_seen(spread, number) < least
    gains = drawn(power.gain_seen(spread, number))
    seen = np.mean([w > b and mcnemar(w, b) <= 2 * power.spent(number) for w, b in gains])
    assert equal > 0.86 and refused > 0.75 and seen > 0.72  # McNemar's exact test is a little stricter


def test_the_best_of_many_equal_versions_scores_more_by_luck_alone() -> None:
    drawn = np.random.default_rng(4).normal(size=(4000, 50))
    assert power.luck(1) == 0.0
    for versions in (2, 10, 50):
        assert power.luck(versions) == pytest.approx(drawn[:, :versions].max(axis=1).mean(), abs=0.06)
