"""Models side by side: the comparison's rows, and weighted means."""

import pytest

from lewis.errors import InputError
from lewis.evaluation.statistics.comparison import PairingError
from lewis.evaluation.statistics.scored import Scored, comparison_rows, intervals
from lewis.evaluation.statistics.scores import Ends, Evaluated, Part, Samples, Score

DOCUMENTS = tuple("abcdefgh")


def model(label, weights=None, documents=DOCUMENTS, **tasks):
    """A model with 0/1 values of `exact_match` in each task; a task named `loss` has a lower-is-better metric."""
    scores, samples = [], []
    for task, values in tasks.items():
        plain = tuple(map(float, values))
        scores.append(Score(task, "exact_match,none", sum(plain) / len(plain), 0.1, task != "loss", len(plain)))
        samples.append(Samples(task, "exact_match,none", (Part(task, 1.0, "mean", documents, plain),)))
    return Scored.of(label, label, Evaluated(scores, samples, Ends({}, 0, 0, None), {}), weights)


def test_the_rows_by_hand():
    rows = comparison_rows([model("base", t=[0, 0, 0, 0, 0, 0, 0, 1]), model("lewis", t=[1, 1, 1, 1, 1, 1, 1, 0])])
    low, high = rows[0].pop("95 % interval").split(" to ")
    assert -0.1 < float(low) <= 0.25 and 0.9 < float(high) <= 1.3
    assert rows == [
        {
            "metric": "t/exact_match,none ↑",
            "model": "base",
            "score": "0.125 ± 0.1",
            "gain of lewis": "+0.75",
            "wins": "7",
            "losses": "1",
            "p": "0.0703",
            "documents": "8",
        },
        {
            "metric": "t/exact_match,none ↑",
            "model": "lewis",
            "score": "0.875 ± 0.1",
            "gain of lewis": "",
            "95 % interval": "",
            "wins": "",
            "losses": "",
            "p": "",
            "documents": "8",
        },
    ]


def test_a_gain_is_positive_where_lower_is_better():
    rows = comparison_rows([model("base", loss=[1] * 8), model("lewis", loss=[0] * 8)])
    assert rows[0]["gain of lewis"] == "+1" and rows[0]["metric"].endswith("↓") and rows[0]["wins"] == "8"


def test_other_documents_are_an_error_that_names_the_model():
    with pytest.raises(PairingError, match="champion"):
        comparison_rows([model("champion", documents=tuple("ABCDEFGH"), t=[1] * 8), model("lewis", t=[1] * 8)])


def test_a_weighted_mean_is_a_score_like_any_other():
    weights = {"a": 3, "b/exact_match,none": 1}
    base, ours = (model(label, weights, a=[v] * 8, b=[1] * 8) for label, v in (("base", 0), ("lewis", 1)))
    score = base.by_name["weighted/mean,none"]
    assert (score.value, score.samples, score.higher_is_better) == (0.25, 16, True)
    assert score.stderr == pytest.approx((0.075**2 + 0.025**2) ** 0.5)
    row = next(row for row in comparison_rows([base, ours]) if row["metric"].startswith("weighted"))
    assert row["gain of lewis"] == "+0.75" and row["documents"] == "16"


def test_wrong_weights_are_named():
    with pytest.raises(InputError, match=r"evaluate\.weights: .* got 'bb'"):
        model("base", {"bb": 1}, b=[1] * 8)
    with pytest.raises(InputError, match="some of these scores are better high"):
        model("base", {"a": 1, "loss": 1}, a=[1] * 8, loss=[1] * 8)


def test_intervals_of_the_models_own_scores():
    found = intervals([model("base", t=[0, 1] * 4)])
    low, high = found["base", "t", "exact_match,none"]
    assert low < 0.5 < high
