"""A bucket that lists stale or partial names, does calls twice, or loses half of an upload and says nothing.

What is read is right or absent, never wrong; nothing hangs; when the bucket behaves again, all is found by all.
"""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lewis import store
from lewis.store import lease, remote
from lewis.store import outdated as in_remote
from lewis.store.housekeeping import Needed
from lewis.store.lease import Lease
from tests.faults.fuzz import DRAWS
from tests.lewis.store.test_remote import importance, scores
from tests.support.odd_bucket import OddBucket
from tests.support.shared_entries import ENTRIES, Shared

FAULTS = {
    "lists stale names": {"stale": 0.5},
    "lists partial names": {"partial": 0.5},
    "does calls twice": {"twice": 0.5},
    "loses half of an upload": {"lost": 0.3},
    "all of these": {"stale": 0.3, "partial": 0.3, "twice": 0.3, "lost": 0.2},
}
SEEDS = DRAWS // 25
POLL = 0.005
OLD = 100 * 86400.0  # seconds


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[OddBucket]:
    monkeypatch.setenv("LEWIS_STORE", "odd://bucket/prefix")
    monkeypatch.setenv("LEWIS_STORE_MERGED", "1")
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_WAIT", 0.0)
    monkeypatch.setattr(remote, "_SILENT", 0.0)
    monkeypatch.setattr(remote, "_asleep", {})
    for name, value in {"SECONDS": 0.3, "GRACE": 0.1, "_POLL": POLL}.items():
        monkeypatch.setattr(lease, name, value)
    OddBucket.struck.clear()
    return OddBucket


def seeds(least: int, faults: dict[str, float]) -> Iterator[int]:
    """So many seeds, and more until each part of a fault has changed something."""
    seed = 0
    while seed < least or not all(OddBucket.struck[part] for part in faults):
        assert seed < least + 1000, OddBucket.struck
        yield seed
        seed += 1


@pytest.mark.parametrize("fault", FAULTS)
def test_entries_are_right_or_absent(
    bucket: type[OddBucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Of each kind, made as the steps make them: under the entry's lease."""
    for name, value in {"SECONDS": 0.02, "GRACE": 0.005, "_POLL": 0.001}.items():
        monkeypatch.setattr(lease, name, value)
    for seed in seeds(SEEDS // 2, FAULTS[fault]):
        draw = random.Random(seed)
        bucket.clear(seed, **FAULTS[fault])
        right: dict[str, object] = {}

        def use(machine: int, entry: Shared, seed: int = seed, right: dict[str, object] = right) -> None:
            monkeypatch.setenv("LEWIS_HOME", str(tmp_path / f"{seed}-{machine}"))
            with store.turn(entry.kind, entry.digest):
                if (found := entry.read()) is None:
                    entry.make()
                    found = entry.read()
            assert found and right.setdefault(entry.kind.name, found) == found, (fault, seed, machine, entry)

        for _ in range(16):
            use(draw.randrange(3), draw.choice(list(ENTRIES.values())))
        bucket.behave()
        for machine in (3, 4):  # new machines: they find it, or make it and send it again
            for entry in ENTRIES.values():
                use(machine, entry)
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / f"{seed}-5"))
        assert {name: entry.read() for name, entry in ENTRIES.items()} == right, (fault, seed)


@pytest.mark.parametrize("faults", [{"stale": 0.5}, {"partial": 0.5}, {"stale": 0.3, "partial": 0.3, "twice": 0.3}])
def test_nothing_young_or_needed_is_removed(
    bucket: type[OddBucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, float]
) -> None:
    """A list may say of an entry what it was before it was written again, or leave out its newest object."""
    needed = {
        "scores": Needed(lambda path: path.stem == ENTRIES["scores"].digest, ""),
        "grams": Needed(lambda path: (store.read_json(path / store.MANIFEST) or {}).get("digest") == "d", ""),
    }
    for seed in seeds(SEEDS, faults):
        bucket.clear(seed)
        before = time.time() - OLD
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / f"{seed}-maker"))
        for entry in ENTRIES.values():
            entry.make()
        bucket.modified_at.update(dict.fromkeys(bucket.objects, before - 60))
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / f"{seed}-keeper"))
        assert {each.key.partition("/")[0] for each in in_remote.entries(before, needed)} == ENTRIES.keys() - needed
        again = [random.Random(seed).choice(sorted(ENTRIES.keys() - needed)), "merged"]
        for name in list(bucket.objects):  # found damaged by a reader, and sent again
            if name.split("/")[2] in again:
                remote.opened()[0].pipe_file(name, bucket.objects[name])
        kept = {*needed, *again}
        right = {name: data for name, data in bucket.objects.items() if name.split("/")[2] in kept}
        bucket.behave(**faults)
        for _ in range(4):
            for each in in_remote.entries(before, needed):
                in_remote.remove(each)
        assert right.items() <= bucket.objects.items(), (faults, seed, again)
        bucket.behave()
        for each in in_remote.entries(before, needed):
            in_remote.remove(each)
        assert right == {name: data for name, data in bucket.objects.items() if "/leases/" not in name}, (faults, seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lease_is_given_on(bucket: type[OddBucket], fault: str) -> None:
    """Two may hold it, which costs double work; nobody waits for ever, or asks without a rest."""
    turns, workers = 2, 3
    for seed in seeds(max(1, SEEDS // 10), FAULTS[fault]):
        bucket.clear(seed, **FAULTS[fault])
        bucket.lists, begun = 0, time.monotonic()
        done: list[int] = []

        def work(number: int, done: list[int] = done) -> None:
            for _ in range(turns):
                with Lease("x").acquire():
                    time.sleep(0.002)
            done.append(number)

        threads = [threading.Thread(target=work, args=[number], daemon=True) for number in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(done) == [0, 1, 2], (fault, seed)
        # Between two rests of `_POLL` a try looks at most twice, and once more after each rest of a fifth of it.
        rests = (time.monotonic() - begun) / POLL
        assert bucket.lists <= workers * (7 * rests + 10 * turns), (fault, seed, bucket.lists, rests)


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
