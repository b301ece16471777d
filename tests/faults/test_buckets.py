"""A bucket that lists stale or partial names, does calls twice, or loses half of an upload and says nothing.

What is read is right or absent, never wrong; nothing hangs; when the bucket behaves again, all is found by all.
"""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lewis import store
from lewis.store import kinds, lease, remote
from lewis.store.lease import Lease
from tests.faults.fuzz import DRAWS
from tests.lewis.store.test_remote import MAKERS, grams, importance, scores, whole
from tests.support.odd_bucket import OddBucket

FAULTS = {
    "lists stale names": {"stale": 0.5},
    "lists partial names": {"partial": 0.5},
    "does calls twice": {"twice": 0.5},
    "loses half of an upload": {"lost": 0.3},
    "all of these": {"stale": 0.3, "partial": 0.3, "twice": 0.3, "lost": 0.2},
}
SEEDS = DRAWS // 25


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[OddBucket]:
    monkeypatch.setenv("LEWIS_STORE", "odd://bucket/prefix")
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_WAIT", 0.0)
    monkeypatch.setattr(remote, "_SILENT", 0.0)
    monkeypatch.setattr(remote, "_asleep", {})
    for name, value in {"SECONDS": 0.3, "GRACE": 0.1, "_POLL": 0.005}.items():
        monkeypatch.setattr(lease, name, value)
    return OddBucket


def read(path: Path) -> object:
    """What a reader gets of an entry; None if there is none."""
    if not whole(path):
        return None
    if path.is_dir():
        return {each.name: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    second = kinds.IMPORTANCE.beside_of(path)
    return path.read_bytes(), second.read_bytes() if path.parent.name == "importance" else b""


@pytest.mark.parametrize("fault", FAULTS)
def test_entries_are_right_or_absent(
    bucket: type[OddBucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    for seed in range(SEEDS):
        draw = random.Random(seed)
        bucket.clear(seed, **FAULTS[fault])
        right: dict[str, object] = {}

        def use(machine: int, make: Callable[[], Path], seed: int = seed, right: dict[str, object] = right) -> None:
            monkeypatch.setenv("LEWIS_HOME", str(tmp_path / f"{seed}-{machine}"))
            path = {scores: kinds.SCORES.path("5c"), grams: kinds.GRAMS.path("9a")}.get(
                make, kinds.IMPORTANCE.path("1b")
            )
            found = read(path)
            if found is None:
                found = read(make())
            assert right.setdefault(path.name, found) == found, (fault, seed, machine, path)

        for _ in range(12):
            use(draw.randrange(3), draw.choice(MAKERS))
        bucket.behave()
        for machine in (3, 4):  # new machines: they find it, or make it and send it again
            for make in MAKERS:
                use(machine, make)
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / f"{seed}-5"))
        for path in (kinds.SCORES.path("5c"), kinds.GRAMS.path("9a"), kinds.IMPORTANCE.path("1b")):
            assert read(path) == right[path.name], (fault, seed, path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lease_is_given_on(bucket: type[OddBucket], fault: str) -> None:
    """Two may hold it, which costs double work; nobody waits for ever, or asks without a rest."""
    for seed in range(max(1, SEEDS // 10)):
        bucket.clear(seed, **FAULTS[fault])
        done: list[int] = []

        def work(number: int, done: list[int] = done) -> None:
            for _ in range(2):
                with Lease("x").acquire():
                    time.sleep(0.002)
            done.append(number)

        threads = [threading.Thread(target=work, args=[number], daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(done) == [0, 1, 2], (fault, seed)


def test_a_name_that_stays_in_the_list_of_a_lease(bucket: type[OddBucket], monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that has a name which was removed long ago: the work goes on without the lease."""
    asked = []

    def ls(self: OddBucket, path: str, **_: object) -> list[str]:
        asked.append(path)
        return [f"{path}/00000004"]

    bucket.clear(0)
    monkeypatch.setattr(bucket, "ls", ls)
    with Lease("x").acquire():
        pass
    assert len(asked) < 50 and not bucket.objects
    assert store.read_entry(scores()) == {"results": {"a": 1}} and importance().exists()
