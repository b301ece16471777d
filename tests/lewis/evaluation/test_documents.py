"""Two models document by document: which differ, which are lost, and which expert has them right."""

from dataclasses import replace

import pytest

from lewis.evaluation.documents import side_by_side
from lewis.evaluation.statistics.scored import Scored
from lewis.evaluation.statistics.scores import Evaluated

NAMES = ("d0", "d1", "d2", "d2", "d3")  # two equal documents


def model(label: str, answers: dict[int, str], *, higher: bool = True, key: str = "", **tasks: list[float]) -> Scored:
    """As the store has it; `answers` are of the documents of the task `sums`, `tasks` have a value per document."""
    content = {
        "results": {name: {"acc,none": sum(each) / len(each), "sample_len": 5} for name, each in tasks.items()},
        "higher_is_better": {name: {"acc": higher} for name in tasks},
        "documents": {name: NAMES for name in tasks},
        "samples": [
            {"task": name, "metric": "acc,none", "aggregation": "mean", "values": each} for name, each in tasks.items()
        ],
        "groups": {},
        "ends": {"empty": {}, "tried": 0, "ended": 0, "perplexity": None},
        "texts": {
            "sums": [
                {"document": place, "prompt": f"p{place}", "target": "t", "answer": answer}
                for place, answer in answers.items()
            ]
        }
        if answers
        else {},
    }
    return Scored.of(label, key or label, Evaluated.of(label, content))


ANSWERS = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}


def test_documents_that_differ_in_score_come_first_then_those_with_other_answers() -> None:
    base = model("base", {**ANSWERS, 2: "x"}, sums=[1, 0, 1, 0, 1])
    found = side_by_side(None, [base, model("lewis", ANSWERS, sums=[1, 0, 1, 1, 0])])
    assert found and (found.ours, found.reference, found.experts) == ("lewis", "base", ())
    names = [("sums", "d2", 1), ("sums", "d3", 0), ("sums", "d2", 0), ("sums", "d0", 0), ("sums", "d1", 0)]
    assert [each.name for each in found.shown()[:5]] == names and [each.name for each in found.shown()[:2]] == names[:2]
    assert [each.gain for each in found.shown()[:3]] == [1, -1, 0]
    [pair] = [each.texts for each in found.shown()[:3] if each.name == names[2]]
    assert pair and [each.answer for each in pair] == ["c", "x"]


def test_what_is_lost_and_which_expert_has_it_right() -> None:
    models = [
        model("base", ANSWERS, sums=[0, 0, 0, 0, 0], words=[0, 0, 0, 0, 0]),
        model("math", {}, sums=[1, 0, 1, 0, 0], words=[0, 0, 0, 0, 0]),
        model("code", {}, sums=[0, 0, 1, 0, 0], words=[0, 1, 0, 0, 0]),
        model("uniform", {}, sums=[1, 1, 1, 1, 1], words=[1, 1, 1, 1, 1]),
        model("champion", {0: "a"}, sums=[1, 1, 1, 0, 0], words=[0, 1, 0, 0, 0]),
        model("lewis", {0: "z"}, sums=[0, 0, 0, 0, 1], words=[0, 0, 0, 0, 0]),
    ]
    found = side_by_side("words/acc,none", models)
    assert found and found.reference == "champion" and found.experts == ("math", "code")
    told = [(each.key, each.name[1:], each.had) for each in found.lost()]
    assert told == [
        ("sums/acc,none", ("d0", 0), ("math",)),  # its texts are known
        ("sums/acc,none", ("d1", 0), ()),
        ("words/acc,none", ("d1", 0), ("code",)),
        ("sums/acc,none", ("d2", 0), ("math", "code")),
    ]
    assert [each.name for each in found.shown()[:20]] == [("sums", "d0", 0)]


def test_where_lower_is_better_a_document_is_lost_that_grows() -> None:
    base = model("base", {}, higher=False, loss=[1, 1, 1, 1, 1])
    found = side_by_side(None, [base, model("lewis", {}, higher=False, loss=[2, 0, 1, 1, 1])])
    assert found and [each.name[1] for each in found.lost()] == ["d0"]


@pytest.mark.parametrize("label", ["base", "math", "champion"])
def test_without_another_model_there_is_nothing_beside_it(label: str) -> None:
    ours = model("lewis", ANSWERS, key="same", sums=[1, 0, 1, 1, 0])
    assert side_by_side(None, []) is None and side_by_side(None, [ours]) is None
    assert side_by_side(None, [replace(ours, label=label), ours]) is None  # the same model
