"""With a quota, work that does not fit is refused before it begins, after what nobody needs has made way."""

import os
import time
from pathlib import Path

import pytest

from lewis import store
from lewis.errors import InputError
from lewis.registry import retention
from lewis.registry.retention import make_room
from lewis.store import kinds, runs

OLD = time.time() - 30 * 86400


@pytest.fixture
def filled(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three statistics of 1 MB: unused for 30 and for 20 days, and just now; nothing is registered."""
    paths = [kinds.GRAMS.path(digit * 64) for digit in "abc"]
    for path, used in zip(paths, (OLD, OLD + 10 * 86400, time.time()), strict=True):
        with store.publish(path, {"model": "m"}) as scratch:
            (scratch / "x").write_bytes(os.urandom(10**6))
        os.utime(path / store.MANIFEST, (used, used))
    monkeypatch.setenv("LEWIS_QUOTA", "10MB")
    return paths


def left(paths: list[Path]) -> list[bool]:
    return [path.exists() for path in paths]


def test_what_is_unused_longest_makes_way(filled: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    free = store.free_space(store.home())
    assert make_room(free) == 0 and left(filled) == [True] * 3
    assert make_room(free + 500_000) > 900_000 and left(filled) == [False, True, True]
    assert "1 entries that nothing needs were removed" in caplog.text
    store.check_space(kinds.MERGED.folder, free + 500_000)
    make_room(20 * 10**6)  # more than it can ever hold
    assert left(filled) == [False, False, True]
    with pytest.raises(InputError, match=r"output needs 20.0 MB, LEWIS_QUOTA leaves 9.0 MB; raise LEWIS_QUOTA"):
        store.check_space(kinds.MERGED.folder, 20 * 10**6)


def test_what_a_run_uses_or_a_version_needs_stays(filled: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from lewis.store.housekeeping import Needed

    monkeypatch.setattr(
        retention, "by_versions", lambda: {kinds.GRAMS.name: Needed(lambda path: path.stem.startswith("a"), "")}
    )
    (store.home() / "runs").mkdir()
    note = store.home() / "runs" / "1"
    note.touch()
    os.utime(note, (OLD + 5 * 86400, OLD + 5 * 86400))  # it began before the second was used last
    (store.home() / "runs" / "2").symlink_to("gone")  # a run that ends right now: listed, and not there
    with runs.lock("1"):
        assert make_room(20 * 10**6) == 0 and left(filled) == [True] * 3
    assert make_room(20 * 10**6) > 0 and left(filled) == [True, False, True]


@pytest.mark.parametrize(("days", "stay"), [(6, True), (8, False)])
def test_what_a_run_that_died_has_used_stays_for_a_week(filled: list[Path], days: float, stay: bool) -> None:
    """The service keeps its note, so that for as long as the service ran, nothing made way for any other run."""
    note, began, used = store.home() / "runs" / "1", time.time() - days * 86400, time.time() - 7200 - store.MARK_EVERY
    note.parent.mkdir()
    note.touch()
    os.utime(note, (began, began))
    for path in filled:
        os.utime(path / store.MANIFEST, (used, used))
    assert (make_room(20 * 10**6) == 0) == stay and left(filled) == [stay] * 3


@pytest.mark.parametrize("given", ["", "200"])
def test_without_a_quota_nothing_goes(filled: list[Path], given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_QUOTA", given)
    if not given:
        assert make_room(10**15) == 0 and left(filled) == [True] * 3
        assert store.free_space(store.home()) > 10**7
    else:
        assert store.free_space(store.home()) == 0  # it is full already
        assert store.free_space(Path("/")) > 0


@pytest.mark.parametrize("given", ["ten", "0", "-1GB", "5PB"])
def test_a_wrong_quota_is_told(home: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_QUOTA", given)
    with pytest.raises(InputError, match="LEWIS_QUOTA: expected a size such as 5GB"):
        store.free_space(store.home())
