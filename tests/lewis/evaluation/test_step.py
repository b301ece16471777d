"""The results of several tasks as one, with results by hand."""

from typing import Any

import pytest

from lewis.errors import InputError
from lewis.evaluation.statistics.scores import Evaluated
from lewis.evaluation.step import joined_results


def of_task(value: float, group: str = "", **changes: Any) -> dict[str, Any]:
    """The harness's results of the task `arc`, alone or in a group."""
    content: dict[str, Any] = {
        "results": {"arc": {"acc,none": value, "sample_len": 2}} | ({group: {"alias": group}} if group else {}),
        "higher_is_better": {"arc": {"acc": True}},
        "n-shot": {"arc": 0},
        "documents": {"arc": ["d1", "d2"]},
        "groups": {group: {}} if group else {},
        "samples": [{"task": "arc", "metric": "acc,none", "aggregation": "mean", "values": [value, value]}],
        "texts": {"arc": [{"document": 0, "prompt": "who ?", "target": "a", "answer": "b"}]},
        "ends": {"empty": {}, "tried": 0, "ended": 0, "perplexity": None},
    }
    return content | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"n-shot": {"arc": 25}},
        {"documents": {"arc": ["d1", "d3"]}},
        {"results": {"arc": {"acc_norm,none": 1.0, "sample_len": 2}}},
        {"texts": {"arc": [{"document": 0, "prompt": "which ?", "target": "a", "answer": "b"}]}},
    ],
    ids=["examples", "documents", "metrics", "prompts"],
)
def test_a_task_that_is_in_a_group_too_with_other_settings_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"evaluate.tasks: arc is there twice"):
        joined_results([of_task(0.0), of_task(1.0, "openllm", **changes)])


def test_a_task_that_was_scored_on_a_part_alone_and_on_all_in_a_group_is_no_error() -> None:
    part = of_task(0.0, documents={"arc": ["d2"]}, pools={"arc": 2})
    assert joined_results([part, of_task(1.0, "openllm")])["documents"] == {"arc": ["d2"]}


def test_score_and_samples_of_a_task_that_is_in_a_group_too_are_of_one_run() -> None:
    """On a GPU two runs of one task may differ a little: other documents are in a batch."""
    found = Evaluated.of("m", joined_results([of_task(0.5), of_task(1.0, "openllm")]))
    assert [(score.key, score.value) for score in found.scores] == [("arc/acc,none", 0.5)]
    assert found.samples[0].value() == 0.5
