"""When an evaluation ends early: which looks there are, what they spend, and that the real gate keeps its error."""

import numpy as np
import pytest

from lewis.evaluation.statistics import comparison, power
from lewis.evaluation.statistics.comparison import compare
from lewis.evaluation.statistics.looks import Look, look_at, sizes
from lewis.evaluation.statistics.scores import Part, Samples
from lewis.recipe.schema import Gate
from tests.support.looks import drawn, judged
from tests.support.releases import KEY

DOCUMENTS = 400
MARGIN = power.margin(power.spread([(1.0, DOCUMENTS)]))


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 50)  # they decide nothing where answers are right or wrong


def test_the_looks_double_and_their_parts_of_the_error_add_up_to_all_of_it() -> None:
    assert sizes(47) == [] and sizes(48) == [32] and sizes(1000) == [32, 64, 128, 256, 512]
    for pool in (40, 400, 5000):
        looks = [look_at("known", size, {"a": 9, "b": pool}) for size in [*sizes(pool), None]]
        assert sum(look.passing for look in looks) == pytest.approx(1)
        assert [look.after for look in looks] == [*sizes(pool), None, None][1:] and looks[-1].passing >= 0.8
        worse = [look_at("worse", size, {"b": pool}) for size in sizes(pool)]
        assert not any(look.passing for look in worse) and sum(look.failing for look in worse) <= 1 + 1e-9
        assert look_at("worse", None, {"b": pool}).passing == 1
    assert look_at("known", 32, {"a": 40}) == Look(32, {"a": 40}, 0.0, 0.0)  # it is too many of all to look at


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "gain"), [("not_worse", -MARGIN), ("better", 0.0)], ids=["worse by the margin", "equal"]
)
def test_what_is_no_better_passes_in_no_more_than_the_stated_share(policy: str, gain: float) -> None:
    gate, passed, rows = Gate(metric=KEY, policy=policy), 0, 150
    for seed in range(rows):
        found, _ = judged(gate, "known", drawn(np.random.default_rng(seed), gain, DOCUMENTS))
        passed += found.passed
    allowed = 0.05 if policy == "not_worse" else power.spent(1)
    assert 0 < passed <= rows * allowed + 2 * (rows * allowed * (1 - allowed)) ** 0.5


@pytest.mark.slow
def test_scoring_ends_for_a_gain_only_if_it_is_shown_to_be_as_large_as_is_asked_for() -> None:
    gate = Gate(metric=KEY, policy="better", min_gain=0.1)
    found = [judged(gate, "known", drawn(np.random.default_rng(seed), 0.1, DOCUMENTS)) for seed in range(150)]
    assert sum(each.passed for each, number in found if number < DOCUMENTS) <= 3  # 0.75 are allowed
    sure, number = judged(gate, "known", drawn(np.random.default_rng(1), 0.4, DOCUMENTS))
    assert sure.passed and number < DOCUMENTS and "must gain at least 0.1:" in sure.reasons[0]


@pytest.mark.parametrize(
    ("policy", "gain", "passes", "documents"),
    [
        ("not_worse", 0.3, True, 80),
        ("not_worse", 0.0, True, 400),
        ("not_worse", -0.3, False, 80),
        ("better", 0.3, True, 80),
        ("better", -0.3, False, 80),
    ],
)
def test_a_clear_case_takes_a_fifth_of_the_documents_and_the_verdict_is_that_of_all(
    policy: str, gain: float, passes: bool, documents: int
) -> None:
    gate = Gate(metric=KEY, policy=policy)
    found = [judged(gate, "known", drawn(np.random.default_rng(seed), gain, DOCUMENTS)) for seed in range(40)]
    whole = [judged(gate, "never", drawn(np.random.default_rng(seed), gain, DOCUMENTS))[0] for seed in range(40)]
    same = sum(early.passed is late.passed for (early, _), late in zip(found, whole, strict=True))
    assert same >= 38 and sum(early.passed is passes for early, _ in found) >= 34
    assert np.mean([number for _, number in found]) <= documents
    early, number = found[0]
    if number < DOCUMENTS:
        assert f" on {number} of 400 documents" in early.numbers
        assert any(each.startswith(f"note: {number} of 400 documents of each task were") for each in early.reasons)


def test_with_worse_what_passes_has_been_scored_on_all_documents() -> None:
    gate = Gate(metric=KEY)
    good, bad = (judged(gate, "worse", drawn(np.random.default_rng(3), gain, DOCUMENTS)) for gain in (0.3, -0.3))
    assert good[0].passed and good[1] == DOCUMENTS and not bad[0].passed and bad[1] < DOCUMENTS


def of(values: np.ndarray, parts: int = 1) -> Samples:
    each = np.array_split(values, parts)
    return Samples(
        "maths",
        "f1,none",
        tuple(
            Part(f"t{n}", 1 / parts, "mean", tuple(map(str, range(len(v)))), tuple(map(float, v)))
            for n, v in enumerate(each)
        ),
    )


def test_models_that_do_not_differ_are_not_shown_to_be_worse_by_more_than_a_tolerance() -> None:
    equal, few = np.zeros(60), np.zeros(60)
    few[:8] = 1.0
    for parts in (1, 2):
        same, lost = (compare(of(equal, parts), of(theirs, parts)) for theirs in (equal, few))
        assert same.p_superior(-0.0) == 1 and same.p_superior(-0.01) > 0.3
        assert lost.p_superior(-0.01) < 0.05 and lost.p_superior(-0.3) > 0.9


def test_a_gain_that_is_ruled_out_and_losses_that_no_document_shows() -> None:
    from scipy.stats import binom

    equal, few, many = np.zeros(60), np.zeros(60), np.zeros(60)
    few[:5], many[:30] = 1.0, 1.0
    lost = compare(of(equal), of(few))  # five documents lost, none won
    assert lost.p_superior(0) == pytest.approx(binom.cdf(0, 5, 0.5)) and compare(of(few), of(equal)).p_superior(0) == 1
    assert compare(of(equal), of(many)).p_superior(0.05) < 1e-6 < 0.05 < compare(of(many), of(equal)).p_superior(0.05)
    halves = compare(of(equal, 2), of(equal, 2))
    assert halves.p_inferior(0.05) < 0.05 and halves.p_unseen(0.05) == pytest.approx(0.95**60)
    assert compare(of(many, 2), of(equal, 2)).p_unseen(0.05) == 0 and lost.p_unseen(0.05) == 0
