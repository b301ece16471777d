"""The store's remote half on an S3 server: entries arrive whole, leases have one holder, a server may be killed."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from lewis import store
from lewis.store import kinds, lease, remote
from lewis.store.lease import Lease
from tests.lewis.store.test_remote import MAKERS, hold, scores, whole
from tests.production.s3_server import BUCKET, S3Server


class Machines:
    """Machines with a store of their own each; a prefix of the bucket is their remote half."""

    def __init__(self, root: Path, server: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.server, self.prefix, self._set = root, server, prefix, monkeypatch.setenv

    def use(self, name: str) -> None:
        self._set("LEWIS_HOME", str(self.root / name))

    def objects(self) -> list[str]:
        return [name.removeprefix(f"{self.prefix}/") for name in self.server.objects(self.prefix)]


@pytest.fixture
def machines(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LEWIS_STORE", f"s3://{BUCKET}/{tmp_path.name}/")
    monkeypatch.setattr(remote, "_asleep", {})
    found = Machines(tmp_path, s3, tmp_path.name, monkeypatch)
    found.use("one")
    return found


@pytest.mark.parametrize("make", MAKERS)
def test_what_one_machine_made_another_fetches(machines: Machines, make: Callable[[], Path]) -> None:
    made = make()
    files = sorted(p.relative_to(made.parent) for p in made.parent.rglob("*") if p.is_file())
    assert not list((machines.root / "one" / "unpushed").iterdir())
    machines.use("two")
    there = machines.root / "two" / made.parent.name / made.name
    assert whole(there) and sorted(p.relative_to(there.parent) for p in there.parent.rglob("*") if p.is_file()) == files
    assert sorted(machines.objects()) == sorted(f"{made.parent.name}/{name}" for name in files)


def test_damage_is_removed_and_made_again(machines: Machines) -> None:
    made = scores()
    (object_,) = machines.objects()
    data = made.read_bytes()
    where = f"{machines.prefix}/{object_}"
    machines.server.client().put_object(Bucket=BUCKET, Key=where, Body=data.replace(b"1", b"2"))
    machines.use("two")
    there = machines.root / "two" / "scores" / made.name
    assert not whole(there) and machines.objects() == []
    assert whole(scores()) and machines.objects() == [object_]


def test_the_lease_of_a_killed_holder_ends(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 4.0)
    monkeypatch.setattr(lease, "GRACE", 0.5)
    monkeypatch.setattr(lease, "_POLL", 0.1)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=[ready])
    holder.start()
    assert ready.wait(20)
    time.sleep(6)  # the holder renews it
    with pytest.raises(Timeout):
        Lease("x").acquire(timeout=0)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    begin = time.monotonic()
    with Lease("x").acquire():
        assert time.monotonic() - begin < 8
        with pytest.raises(Timeout):
            Lease("x").acquire(timeout=0.05)
    begin = time.monotonic()
    with Lease("x").acquire():  # what is given back is free at once
        assert time.monotonic() - begin < 1.5


def test_of_many_one_holds_it(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_POLL", 0.01)
    inside, most, turns, started = [0], [0], [0], threading.Barrier(6)

    def work() -> None:
        started.wait()
        for _ in range(4):
            with Lease("y").acquire():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.02)
                inside[0] -= 1
                turns[0] += 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert turns == [24] and most == [1] and len(machines.objects()) == 1


def test_a_server_that_is_killed_in_the_middle_of_an_upload(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The large object never arrives whole; the entry is not believed, and the next entry takes it along."""
    put = remote._put

    def dying(system: Any, source: Path, target: str, size: int) -> None:
        if size > 1_000_000:
            threading.Timer(0.05, machines.server.kill).start()
        put(system, source, target, size)

    monkeypatch.setattr(remote, "_TRIES", 1)
    folder = kinds.GRAMS.path("9a")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(remote, "_put", dying)
            with store.publish(folder, {"digest": "d"}) as scratch:
                (scratch / "small").write_text("small")
                (scratch / "weights").write_bytes(os.urandom(200_000_000))
        assert "the run goes on without" in caplog.text and whole(folder)
    finally:
        if not machines.server.process:
            machines.server.start()
    assert "grams/9a/lewis.json" not in machines.objects()
    machines.use("two")
    remote._asleep.clear()
    assert not whole(machines.root / "two" / "grams" / "9a")
    machines.use("one")
    for note in (machines.root / "one" / "unpushed").iterdir():
        os.utime(note, (1, 1))
    scores()
    machines.use("two")
    there = machines.root / "two" / "grams" / "9a"
    assert whole(there) and (there / "weights").read_bytes() == (folder / "weights").read_bytes()


def test_a_wrong_key_stops_no_run_and_is_told_without_the_key(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another key of the bucket")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert whole(scores()) and machines.objects() == []
        with Lease("x").acquire():
            pass
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert "the run goes on without" in caplog.text and "no lease of x" in caplog.text
    assert "another key" not in caplog.text
