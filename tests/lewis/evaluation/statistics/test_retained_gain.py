"""How much of each expert's gain is kept: fractions by hand."""

import math

import pytest

from lewis.evaluation.statistics.retained_gain import kept_gains, kept_rows
from lewis.evaluation.statistics.scored import Scored
from lewis.evaluation.statistics.scores import Ends, Part, Samples, Score

NAN = math.nan


def model(label: str, samples: tuple[Samples, ...] = (), **values: float) -> Scored:
    """One `acc` score per task; in tasks whose name begins with `loss`, lower is better."""
    scores = [Score(task, "acc,none", value, None, not task.startswith("loss"), 8) for task, value in values.items()]
    return Scored(label, label, tuple(scores), samples, Ends({}, 0, 0, None))


def fractions(*models: Scored) -> dict[str, tuple[str, float]]:
    """Task -> its expert, and what is kept of that expert's gain."""
    return {
        each.best.task: (each.expert, pytest.approx(each.fraction, nan_ok=True)) for each in kept_gains(None, models)
    }


def test_the_fractions_and_the_table_by_hand() -> None:
    models = [
        model("base", sums=0.5, loss=0.75),
        model("math", sums=0.9, loss=0.8),
        model("code", sums=0.4, loss=0.5),
        model("uniform", sums=0.7, loss=0.75),
        model("champion", sums=0.96),
        model("lewis", sums=0.888, loss=0.55),
    ]
    first, second = kept_gains(None, models)
    assert (first.expert, second.expert) == ("math", "code")
    assert (first.fraction, second.fraction) == (pytest.approx(0.97), pytest.approx(0.8))
    assert first.baselines == {"uniform": pytest.approx(0.5), "champion": pytest.approx(1.15)}
    assert second.baselines == {"uniform": 0.0}
    assert kept_rows([first, second]) == [
        {
            "expert": "math",
            "task": "sums/acc,none ↑",
            "base": "0.5",
            "expert's score": "0.9",
            "merged": "0.888",
            "kept": "97 %",
            "kept by uniform": "50 %",
            "kept by champion": "115 %",
        },
        {
            "expert": "code",
            "task": "loss/acc,none ↓",
            "base": "0.75",
            "expert's score": "0.5",
            "merged": "0.55",
            "kept": "80 %",
            "kept by uniform": "0 %",
            "kept by champion": "-",
        },
    ]


@pytest.mark.parametrize(
    ("base", "math", "code", "merged", "found"),
    [
        (0.2, 0.6, 0.4, 0.7, {"t": ("math", 1.25)}),  # better than the expert
        (0.2, 0.4, 0.6, 0.1, {"t": ("code", -0.25)}),  # worse than the base
        (0.2, 0.6, 0.6, 0.6, {"t": ("math", 1.0)}),  # the first of two equal experts
        (0.2, 0.2, 0.1, 0.3, {}),  # no expert beats the base
        (0.3, 0.1 + 0.2, 0.1, 0.3, {}),  # nor by rounding
        (NAN, 0.6, 0.4, 0.5, {}),
        (0.2, NAN, 0.4, 0.3, {"t": ("code", 0.5)}),
        (0.2, NAN, math.inf, 0.3, {}),
        (0.2, 0.6, 0.4, NAN, {"t": ("math", NAN)}),
    ],
)
def test_one_task(base: float, math: float, code: float, merged: float, found: dict) -> None:
    models = [model("base", t=base), model("math", t=math), model("code", t=code), model("lewis", t=merged)]
    assert fractions(*models) == found
    lower = [model(each.label, loss=-each.scores[0].value) for each in models]
    assert fractions(*lower) == ({"loss": found["t"]} if found else {})


def test_a_merged_model_without_the_score_shows_a_dash() -> None:
    [row] = kept_rows(kept_gains(None, [model("base", t=0.2), model("math", t=0.6), model("lewis", t=NAN)]))
    assert (row["merged"], row["kept"]) == ("-", "-")


def test_nothing_without_base_or_experts() -> None:
    base, expert, uniform, ours = (model(label, t=v) for label, v in zip("bmul", (0.1, 0.9, 0.4, 0.5), strict=True))
    named = [model(name, t=0.5) for name in ("uniform", "champion", "lewis")]
    assert kept_gains(None, []) == kept_gains(None, [expert, uniform, ours]) == [] and kept_rows([]) == []
    assert kept_gains(None, [model("base", t=0.1), *named]) == []
    assert kept_gains(None, [base, *named]) == []  # an expert called `b`, and no base


def test_the_first_metric_of_a_task_counts_or_the_preferred_one() -> None:
    def two(label: str, strict: float, flexible: float) -> Scored:
        scores = (
            Score("gsm8k", "exact_match,strict", strict, None, True, 8),
            Score("gsm8k", "exact_match,flexible", flexible, None, True, 8),
        )
        return Scored(label, label, scores, (), Ends({}, 0, 0, None))

    models = [two("base", 0.0, 0.0), two("math", 1.0, 1.0), two("lewis", 0.25, 0.75)]
    assert [each.fraction for each in kept_gains(None, models)] == [0.25]
    assert [each.fraction for each in kept_gains("gsm8k/exact_match,flexible", models)] == [0.75]
    assert [each.fraction for each in kept_gains("other/acc,none", models)] == [0.25]


def test_a_group_stands_for_its_members_and_the_weighted_mean_is_no_task() -> None:
    parts = tuple(Part(task, 0.5, "mean", ("d",), (1.0,)) for task in ("a", "b"))
    samples = (Samples("group", "acc,none", parts), Samples("weighted", "mean,none", parts))

    def of(label: str, value: float) -> Scored:
        plain = model(label, samples, group=value, a=value, b=value, other=value)
        weighted = Score("weighted", "mean,none", value, None, True, 2)
        return Scored(label, label, (*plain.scores, weighted), samples, plain.ends)

    assert [each.best.task for each in kept_gains(None, [of("base", 0.2), of("math", 0.6), of("lewis", 0.4)])] == [
        "group",
        "other",
    ]
