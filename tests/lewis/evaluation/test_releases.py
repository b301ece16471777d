"""Hundreds of versions in a row before the gate: what chance promotes, what a gain needs, and where losses end."""

import functools

import pytest

from lewis.evaluation.statistics import comparison, power
from lewis.recipe.schema import Gate
from tests.support.releases import KEY, releases

DOCUMENTS = 500
MARGIN = power.margin(power.spread([(1.0, DOCUMENTS)]))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstraps decide nothing where answers are right or wrong, and take most of the time."""
    monkeypatch.setattr(comparison, "RESAMPLES", 50)
    monkeypatch.setattr(comparison, "compare", functools.lru_cache(256)(comparison.compare.__wrapped__))


def equal(number: int, champion: float) -> float:
    return 0.0


def test_the_error_of_all_versions_that_are_ever_compared_with_one_mark_is_that_of_one_test() -> None:
    assert sum(map(power.spent, range(1, 100_000))) == pytest.approx(power.ERROR, rel=1e-4)
    assert power.spent(1) == power.ERROR / 2


@pytest.mark.slow
def test_of_rows_of_equal_versions_hardly_any_has_one_that_is_promoted_for_its_gain() -> None:
    rows = [releases(Gate(metric=KEY, policy="better"), seed, 100, 50, equal) for seed in range(20)]
    assert sum(bool(row.promoted) for row in rows) <= 3  # 1 of 20 is allowed; more than 3 in 2 % of all seeds


@pytest.mark.slow
def test_a_true_gain_is_found_after_a_row_of_equal_versions_with_the_documents_that_a_plan_names() -> None:
    versions = 20
    gain = power.gain_seen(power.spread([(1.0, DOCUMENTS)]), versions)
    rows = [
        releases(
            Gate(metric=KEY, policy="better"),
            seed,
            DOCUMENTS,
            versions,
            lambda number, _: gain if number == versions else 0.0,
        )
        for seed in range(12)
    ]
    assert sum(versions in row.promoted for row in rows) >= 7


@pytest.mark.slow
def test_equal_versions_are_let_in_and_small_losses_end_at_the_margin_where_no_gain_is_asked_for() -> None:
    equals = [releases(Gate(metric=KEY), seed, DOCUMENTS, 40, equal) for seed in range(3)]
    assert 0.65 < sum(len(row.promoted) for row in equals) / (3 * 40) < 0.95
    rows = [releases(Gate(metric=KEY), s, DOCUMENTS, 40, lambda _, champion: champion - MARGIN / 4) for s in range(3)]
    assert all(row.quality[-1] >= -2 * MARGIN for row in rows)
    assert sum(row.quality[-1] for row in rows) / 3 > -1.5 * MARGIN


@pytest.mark.slow
def test_with_fresh_documents_no_champion_keeps_its_luck_and_small_losses_still_end() -> None:
    """Four of five equal versions pass: nine of ten against the champion, and nine of ten against the mark."""
    equals = [releases(Gate(metric=KEY), seed, DOCUMENTS, 40, equal, fresh=True) for seed in range(3)]
    assert 0.74 < sum(len(row.promoted) for row in equals) / (3 * 40) < 0.9
    quarter = MARGIN / 4
    rows = [releases(Gate(metric=KEY), s, DOCUMENTS, 40, lambda _, now: now - quarter, fresh=True) for s in range(3)]
    assert sum(row.quality[-1] for row in rows) / 3 > -2 * MARGIN
