"""The remote half of the store: entries arrive whole or not at all, and a lease has one holder."""

import errno
import io
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
from fsspec.implementations.local import LocalFileSystem

from lewis import store
from lewis.errors import InputError
from lewis.store import kinds, lease, remote, sealed_json
from lewis.store.lease import Lease, SharedLock


class Machines:
    """Machines with a store of their own each and one remote half."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._set = root, monkeypatch.setenv
        self.remote = root / "remote"

    def use(self, name: str) -> None:
        self._set("LEWIS_HOME", str(self.root / name))


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote/prefix/")
    monkeypatch.setattr(remote, "_WAIT", 0.001)
    monkeypatch.setattr(remote, "_asleep", {})
    found = Machines(tmp_path, monkeypatch)
    found.remote = tmp_path / "remote" / "prefix"
    found.use("one")
    return found


def scores() -> Path:
    path = kinds.SCORES.path("5c")
    store.write_entry(path, {"results": {"a": 1}})
    return path


def grams(text: str = "gram") -> Path:
    folder = kinds.GRAMS.path("9a")
    with store.publish(folder, {"digest": "d"}) as scratch:
        (scratch / "block.safetensors").write_text(text)
        (scratch / "deep").mkdir()
        (scratch / "deep" / "b").write_text("b")
    return folder


def importance() -> Path:
    from lewis.importance import measured

    path = kinds.IMPORTANCE.path("1b")
    second = kinds.IMPORTANCE.beside_of(path)
    store.write_bytes(second, b"moments")
    facts = {"moments": {"size": 7, "sha256": store.file_sha256(second)}, measured.NORMS: {"a": 1.0}}
    store.write_entry(path, facts)
    return path


def whole(path: Path) -> bool:
    if path.parent.name == "importance":
        from lewis.importance import measured

        return measured.is_whole(path)
    return store.read_manifest(path) is not None if path.parent.name == "grams" else store.read_entry(path) is not None


MAKERS: list[Callable[[], Path]] = [scores, grams, importance]


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_a_path_without_a_scheme_is_a_folder_that_need_not_exist(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Nothing was ever pushed there: its folders were missing."""
    monkeypatch.setenv("LEWIS_STORE", f"{scheme}{machines.remote}")
    scores()
    machines.use("two")
    assert store.read_entry(kinds.SCORES.path("5c")) is not None


@pytest.mark.parametrize("make", MAKERS)
def test_what_one_machine_made_another_fetches(machines: Machines, make: Callable[[], Path]) -> None:
    made = make()
    files = sorted(p.relative_to(made.parent) for p in made.parent.rglob("*") if p.is_file())
    assert not list((machines.root / "one" / "unpushed").iterdir())
    machines.use("two")
    there = machines.root / "two" / made.parent.name / made.name
    with remote.looking() as asked:
        assert whole(there) is not made.is_dir()
    assert [each.path for each in asked] == ([there] if made.is_dir() else []) and there.exists() is not made.is_dir()
    assert whole(there) and sorted(p.relative_to(there.parent) for p in there.parent.rglob("*") if p.is_file()) == files
    assert sum(each.size for each in asked) == made.is_dir() * sum(
        (there.parent / name).stat().st_size for name in files
    )
    assert oct(there.parent.stat().st_mode)[-2:] == "00"
    assert not list(machines.root.rglob("*.partial"))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damage_is_never_believed_and_made_again(
    machines: Machines, make: Callable[[], Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = make()
    if made.is_dir():
        object_ = machines.remote / "grams" / made.name / "block.safetensors"
    else:
        object_ = machines.remote / made.parent.name / (kinds.IMPORTANCE.beside_of(made).name)
        object_ = object_ if object_.exists() else machines.remote / made.parent.name / made.name
    os.chmod(object_, 0o600)
    if damage == "missing":
        object_.unlink()
    else:
        data = object_.read_bytes()
        object_.write_bytes(data[:-1] if damage == "cut" else data[:-2] + b"~~")
    machines.use("two")
    there = machines.root / "two" / made.parent.name / made.name
    assert not whole(there) and not there.exists()
    assert ("is damaged and made again" in caplog.text) == (damage != "missing" or make is not scores)
    assert not list(machines.root.rglob("*.partial"))
    assert whole(make())
    machines.use("three")
    assert whole(machines.root / "three" / made.parent.name / made.name)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_cut_upload_is_not_believed_and_sent_later(
    machines: Machines, make: Callable[[], Path], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def put_file(self: Any, source: str, target: str, **_: Any) -> None:
        done.append(target)
        if len(done) > number:
            raise ConnectionError("killed")
        LocalFileSystem.cp_file(self, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", put_file)
        made = make()
    if not list((machines.root / "one" / "unpushed").iterdir()):
        pytest.skip("it has fewer objects")
    assert whole(made)
    machines.use("two")
    remote._asleep.clear()
    assert not whole(machines.root / "two" / made.parent.name / made.name)
    machines.use("one")
    for note in (machines.root / "one" / "unpushed").iterdir():
        os.utime(note, (1, 1))
    store.write_entry(kinds.ALLOCATIONS.path("00"), {"experts": {"a": 1}})  # the next entry takes it along
    machines.use("two")
    assert whole(machines.root / "two" / made.parent.name / made.name)


def test_one_that_does_not_answer_stops_nothing_and_is_not_asked_at_once(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def cat_file(self: Any, path: str, **_: Any) -> bytes:
        asked.append(path)
        raise ConnectionError("http://me:secret@host refuses")

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    for digest in ("00", "11"):
        assert store.read_entry(kinds.SCORES.path(digest)) is None
    assert len(asked) == 1 and "the run goes on without" in caplog.text and "secret" not in caplog.text


def test_one_that_connects_when_it_is_opened_and_fails_stops_nothing(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With an FTP server that was down, each run failed: `[Errno 111] Connection refused`."""
    monkeypatch.setenv("LEWIS_STORE", "ftp://127.0.0.1:1/x")
    scores()
    assert "scores/5c.json was not pushed, the run goes on without: ConnectionRefusedError" in caplog.text
    remote._asleep.clear()
    assert store.read_entry(kinds.SCORES.path("6d")) is None
    assert "scores/6d.json was not fetched, the run goes on without: ConnectionRefusedError" in caplog.text
    monkeypatch.setenv("LEWIS_STORE", "reference://x")
    remote._asleep.clear()
    with pytest.raises(InputError, match=r"LEWIS_STORE: reference://x cannot be opened: .*missing 1 required"):
        scores()


def test_an_entry_that_the_quota_has_no_room_for_is_not_fetched(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grams("x" * 100_000)
    machines.use("two")
    monkeypatch.setenv("LEWIS_QUOTA", "50KB")
    assert store.read_manifest(kinds.GRAMS.path("9a")) is None
    assert "100.0 KB to fetch, 50.0 KB free in" in caplog.text


def test_a_noted_merged_model_is_not_sent_while_merged_models_are_not_shared(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_STORE_MERGED", "1")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_push", lambda kind, path: False)
        with store.publish(kinds.MERGED.path("7d"), {"digest": "d"}) as scratch:
            (scratch / "model.safetensors").write_text("weights")
    [note] = (machines.root / "one" / "unpushed").iterdir()
    os.utime(note, (1, 1))
    for shared in ("0", "1"):
        monkeypatch.setenv("LEWIS_STORE_MERGED", shared)
        store.write_entry(kinds.SCORES.path(shared), {"results": {"a": 1}})
        assert (machines.remote / "merged" / "7d").exists() == (shared == "1")


def test_a_full_disk_is_not_filled_with_parts_of_failed_and_killed_uploads(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three tries left one, which nothing removed."""
    killed = machines.remote / "scores" / f".5c.json.{store.writer().partition('-')[0]}-{2**22 + 1}.0a0a0a0a.partial"
    killed.parent.mkdir(parents=True)
    killed.write_text("{")

    def put_file(self: Any, source: str, target: str, **_: Any) -> None:
        Path(target).write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    assert whole(scores()) and not list(machines.remote.rglob("*.partial"))


def test_a_noted_entry_that_is_damaged_here_holds_up_no_other(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was tried again with each later entry, and each time the remote half was not asked for half a minute."""
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_push", lambda kind, path: False)
        made = [grams(), importance()]
    os.chmod(cut := made[0] / "block.safetensors", 0o600)
    cut.write_bytes(b"")
    for note in (machines.root / "one" / "unpushed").iterdir():
        os.utime(note, (1, 1))
    scores()
    assert "grams/9a is damaged and not pushed: block.safetensors: expected 4 bytes, it has 0" in caplog.text
    assert not remote._asleep and not list((machines.root / "one" / "unpushed").iterdir())
    assert (machines.remote / "importance" / made[1].name).exists() and not (machines.remote / "grams").exists()


def test_merged_models_are_a_choice_and_checksums_stay_at_home(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for given, shared in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("LEWIS_STORE_MERGED", given)
        assert remote.shares(kinds.MERGED.path("d")) == shared
    monkeypatch.setenv("LEWIS_STORE_MERGED", "yes")
    with pytest.raises(InputError, match="LEWIS_STORE_MERGED: expected 0 or 1, got 'yes'"):
        remote.shares(kinds.MERGED.path("d"))
    assert not remote.shares(kinds.DIGESTS.path("d")) and not remote.shares(tmp_path / "scores" / "d.json")
    monkeypatch.setenv("LEWIS_STORE", "nosuch://x")
    with pytest.raises(InputError, match="LEWIS_STORE: nosuch://x cannot be opened"):
        remote.fetch(kinds.SCORES.path("d"))
    monkeypatch.setenv("LEWIS_STORE", "")
    assert not remote.shares(kinds.SCORES.path("d"))


def test_names_that_lead_out_of_the_folder_are_refused(machines: Machines, caplog: pytest.LogCaptureFixture) -> None:
    folder = machines.remote / "grams" / "77"
    folder.mkdir(parents=True)
    manifest = {"files": {"../../x": {"size": 1, "sha256": "0" * 64}}}
    (folder / "lewis.json").write_text(sealed_json.dumps(manifest))
    assert store.read_manifest(kinds.GRAMS.path("77")) is None
    assert "expected the name of a file in the folder" in caplog.text


@pytest.mark.timeout(60)
def test_a_block_that_does_not_wait_for_a_lock_takes_it_once_and_gives_it_back(machines: Machines) -> None:
    """It waited for its own lease: with `LEWIS_STORE`, no poll for releases came to an end."""
    with store.SharedLock("poll").acquire(timeout=0), pytest.raises(Timeout):
        store.SharedLock("poll", local="of another machine").acquire(timeout=0)
    with store.SharedLock("poll", local="of another machine").acquire(timeout=0):
        pass


def test_two_machines_make_an_entry_once(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is the same, and the local locks are others: as on two machines."""
    monkeypatch.setattr(lease, "_POLL", 0.01)
    made, started = [], threading.Barrier(2)
    path = kinds.SCORES.path("7e")

    def work(name: str) -> None:
        started.wait()
        with SharedLock("scores-7e", local=name):
            if not path.exists():
                time.sleep(0.05)
                store.write_entry(path, {"results": name})
                made.append(name)

    threads = [threading.Thread(target=work, args=[name]) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(made) == 1 and [path.name for path in (machines.remote / "leases").rglob("0*")] == ["00000002"]


@pytest.mark.parametrize("lost", [True, False])
def test_whoever_made_the_object_has_the_lease(machines: Machines, monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """S3 says that an object exists with another error than a disk does, and an answer may be lost."""

    def create(system: Any, place: str, data: bytes) -> None:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(data if lost else b'{"end": 9e12}')
        raise OSError(22, "At least one of the pre-conditions you specified did not hold")

    monkeypatch.setattr(remote, "create", create)
    mine = Lease("x")
    assert mine._try() == lost
    mine.release()


@pytest.mark.parametrize("error", [FileNotFoundError("no such bucket"), OSError(errno.ENOSPC, "no space left")])
def test_a_lease_that_cannot_be_created_is_not_waited_for(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    def create(system: Any, place: str, data: bytes) -> None:
        raise error

    monkeypatch.setattr(remote, "create", create)
    with Lease("x").acquire(timeout=0):
        assert "no lease of x, the work goes on without" in caplog.text


def test_a_write_that_fails_on_a_disk_leaves_no_object(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "no space left")

    system, root = remote.opened()
    monkeypatch.setattr(remote, "open", Full, raising=False)
    with pytest.raises(OSError, match="no space left"):
        remote.create(system, f"{root}/leases/x/1", b"first")
    assert not system.exists(f"{root}/leases/x/1")


def test_numbers_never_go_back_so_that_a_slow_taker_sees_it_came_too_late(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, create = Lease("x"), remote.create

    def late(system: Any, place: str, data: bytes) -> None:
        monkeypatch.setattr(remote, "create", create)
        for _ in range(2):  # meanwhile others took the lease, gave it back, took it again
            with Lease("x").acquire():
                pass
        holder.acquire()
        create(system, place, data)

    holder = Lease("x")
    monkeypatch.setattr(remote, "create", late)
    assert not slow._try()
    holder.release()
    with slow.acquire():
        pass


def hold(ready: Any) -> None:
    Lease("x").acquire()
    ready.set()
    time.sleep(60)


@pytest.mark.slow
def test_the_lease_of_a_killed_holder_ends(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 4.0)  # renewed each second, also on a busy machine
    monkeypatch.setattr(lease, "GRACE", 0.2)
    monkeypatch.setattr(lease, "_POLL", 0.02)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=[ready])
    holder.start()
    assert ready.wait(120)
    number, end = Lease._highest(LocalFileSystem(), place := str(machines.remote / Lease("x")._folder))
    until = time.monotonic() + 120
    while Lease._highest(LocalFileSystem(), place) == (number, end):  # the holder renews it
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(Timeout):
        Lease("x").acquire(timeout=0)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with Lease("x").acquire(), pytest.raises(Timeout):
        Lease("x").acquire(timeout=0.05)
    with Lease("x").acquire():  # what is given back is free at once
        pass


def test_a_disk_refuses_the_second_of_two_who_both_saw_nothing(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, root = remote.opened()
    monkeypatch.setattr(type(system), "exists", lambda *_, **__: False)  # both looked before one of them wrote
    remote.create(system, f"{root}/leases/x/1", b"first")
    with pytest.raises(FileExistsError):
        remote.create(system, f"{root}/leases/x/1", b"second")
    assert system.cat_file(f"{root}/leases/x/1") == b"first"


def test_only_one_takes_over_what_a_dead_holder_left(machines: Machines) -> None:
    place = machines.remote / Lease("x")._folder
    place.mkdir(parents=True)
    (place / "00000003").write_text('{"end": 1}')
    taken, started = [], threading.Barrier(4)

    def work() -> None:
        mine = Lease("x")
        started.wait()
        if mine._try():
            taken.append(mine)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and [path.name for path in place.iterdir()] == ["00000004"]
    taken[0].release()
    (place / "00000005").write_text("")  # its writer was killed between two bytes: it ends, too
    os.utime(place / "00000005", (1, 1))
    with Lease("x").acquire():
        pass
