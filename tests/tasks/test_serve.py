"""The task that puts the champion into service."""

from pathlib import Path
from typing import Any, cast

import pytest

from lewis.recipe.recipe import Recipe
from lewis.recipe.serve import HaproxyTarget
from lewis.registry import history, promotion, versions
from lewis.serving import records
from lewis_tasks import serve as serving
from lewis_tasks.serve import serve
from tests.conftest import Family
from tests.support.lineage import crowned, make_home


def _target() -> HaproxyTarget:
    servers = {"blue": "http://127.0.0.1:1", "green": "http://127.0.0.1:2"}
    return HaproxyTarget(kind="haproxy", socket="/s", backend="b", servers=servers, prometheus="http://127.0.0.1:3")


def test_a_canary_has_the_time_that_its_steps_may_take() -> None:
    target = _target()
    longest = 60 * target.patience_minutes * len(target.steps)  # by default two days
    assert serve.timeout_seconds is None or serve.timeout_seconds > longest


def test_a_canary_whose_record_is_damaged_fails_no_serving(
    tmp_path: Path,
    family: Family,
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_home(tmp_path / "home", empty_database, monkeypatch)
    version, target = crowned(family.base, "a").version, _target()
    versions.tag(version, {f"{records.CANARY}{target.label}": "[1]"})
    serving._show(cast(Recipe, None), target, version, began="")
    assert "its canary is not shown: models:/tiny/1: its tag lewis.canary.haproxy in MLflow is no record" in caplog.text


def test_a_failed_canary_does_not_roll_back_a_version_that_was_promoted_meanwhile(
    tmp_path: Path, family: Family, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next version was withdrawn, with the numbers of the one that had failed."""
    make_home(tmp_path / "home", empty_database, monkeypatch)
    crowned(family.base, "a")
    failed = crowned(family.base, "b")
    lock = promotion.store.SharedLock

    def late(name: str, *given: Any, **options: Any) -> Any:
        """Another run has the lock, and promotes its version."""
        monkeypatch.setattr(promotion.store, "SharedLock", lock)
        crowned(family.base, "c")
        return lock(name, *given, **options)

    monkeypatch.setattr(promotion.store, "SharedLock", late)
    serving._roll_back(failed, "canary at 10 %: errors 0.3 vs 0.001, FAIL")
    assert promotion.is_champion("tiny", "3") and promotion.withdrawn("tiny", "c" * 64) is None
    assert [each.what for each in history.history("tiny")] == ["promoted"] * 3
