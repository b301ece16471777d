"""The store: whole files and folders or none, and what is believed of them."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lewis import store
from lewis.errors import InputError, RecipeError
from lewis.store import kinds, sealed_json, verification
from lewis.store.manifest import DamagedError, check, remember, remembered_sha256

KILLED_WHILE_IT_REMOVES = """
import os, signal, sys
from pathlib import Path
from lewis import store

left = int(sys.argv[2])

def look(event, arguments):
    global left
    if event in ("os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

with store.publish(Path(sys.argv[1]), {"made": "new"}) as scratch:
    (scratch / "b.txt").write_text("new")
    sys.addaudithook(look)
"""

KILLED_WHILE_IT_REPLACES = """
import os, signal, sys
from pathlib import Path
from lewis import store

def look(event, arguments):
    if event == "os.rename" and Path(arguments[1]) == Path(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

with store.publish(Path(sys.argv[1]), {"made": "new"}) as scratch:
    (scratch / "b.txt").write_text("new")
    sys.addaudithook(look)
"""


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


class TestHome:
    def test_is_lewis_home(self, home: Path) -> None:
        assert store.home() == home

    def test_is_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LEWIS_HOME", "here")
        assert store.home() == tmp_path / "here"

    def test_defaults_to_the_users_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEWIS_HOME", "")
        assert store.home() == Path("~/.cache/lewis").expanduser().resolve()


class TestDigest:
    def test_does_not_depend_on_the_order_of_keys(self) -> None:
        assert store.digest({"a": 1, "b": [2]}) == store.digest({"b": [2], "a": 1})

    def test_sees_every_value(self) -> None:
        values = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": [1]}, {"a": None}, {"b": 1}]
        assert len({store.digest(value) for value in values}) == len(values)


class TestWrite:
    def test_replaces_the_old_file(self, tmp_path: Path) -> None:
        store.write_json(tmp_path / "deep" / "x.json", {"a": "é"})
        store.write_json(tmp_path / "deep" / "x.json", {"a": 2})
        assert store.read_json(tmp_path / "deep" / "x.json") == {"a": 2}
        assert leftovers(tmp_path / "deep") == []

    def test_keeps_the_old_file_if_writing_fails(self, tmp_path: Path) -> None:
        store.write_text(tmp_path / "x", "old")
        with pytest.raises(UnicodeEncodeError):
            store.write_text(tmp_path / "x", "new \ud800")
        assert (tmp_path / "x").read_text() == "old"
        assert leftovers(tmp_path) == []

    def test_reads_nothing_of_a_damaged_entry(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text('{"a": ')
        assert store.read_json(tmp_path / "x.json") is None
        assert store.read_json(tmp_path / "absent.json") is None

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_what_is_no_file_in_the_place_of_an_entry_is_damage(self, home: Path, make: Callable[[Path], None]) -> None:
        """A FIFO was waited for, and a folder was neither moved nor replaced."""
        path = kinds.SCORES.path("5c")
        path.parent.mkdir(parents=True)
        make(path)
        (found,) = verification.verify().damaged
        assert found.entry == str(path) and "expected a regular file" in found.why
        assert store.read_entry(path) is None and not path.exists()  # it was set aside
        store.write_entry(path, {"a": 1})
        assert store.read_entry(path) == {"a": 1} and not verification.verify().damaged


class TestPublish:
    def test_appears_whole_with_a_manifest(self, tmp_path: Path) -> None:
        with store.publish(tmp_path / "out", {"digest": "d"}) as scratch:
            (scratch / "a.txt").write_text("hello")
            assert not (tmp_path / "out").exists()
        manifest = store.read_manifest(tmp_path / "out")
        assert manifest is not None and manifest["digest"] == "d"
        assert manifest["files"] == {"a.txt": {"size": 5, "sha256": store.file_sha256(tmp_path / "out" / "a.txt")}}

    def test_leaves_nothing_behind_when_interrupted(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), store.publish(tmp_path / "out", {}) as scratch:
            (scratch / "a.txt").write_text("half")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_replaces_an_earlier_output(self, tmp_path: Path) -> None:
        for text in ("old", "new"):
            with store.publish(tmp_path / "out", {}) as scratch:
                (scratch / text).write_text(text)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lewis.json", "new"]

    def test_a_kill_while_an_earlier_output_goes_leaves_none_of_it(self, home: Path, tmp_path: Path) -> None:
        """What was left of it without its manifest looked like a stranger's, and was refused ever after."""
        out, found = tmp_path / "out", list[str | None]()
        for number in range(5):  # two scratch names of its own, then two files and the folder
            with store.publish(out, {"made": "old"}) as scratch:
                (scratch / "a.txt").write_text("old")
            command = [sys.executable, "-c", KILLED_WHILE_IT_REMOVES, str(out), str(number)]
            assert subprocess.run(command).returncode == -signal.SIGKILL
            found.append((store.read_manifest(out) or {}).get("made"))
        assert found == ["old", "old", "new", "new", "new"]
        with store.publish(out, {}):
            pass
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize("gone", [False, True])
    def test_a_kill_between_the_two_renames_loses_no_output(self, home: Path, tmp_path: Path, gone: bool) -> None:
        """Both were swept before anything else was made: `lewis backup` lost its only copy."""
        out = tmp_path / "out"
        with store.publish(out, {"made": "old"}) as scratch:
            (scratch / "a.txt").write_text("old")
        assert subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_REPLACES, str(out)]).returncode == -signal.SIGKILL
        assert not out.exists() and len(leftovers(tmp_path)) == 2
        (earlier,) = (path for path in tmp_path.iterdir() if ".earlier_" in path.name)
        assert not store.is_abandoned(earlier)  # `lewis gc` would remove it
        if gone:
            (earlier / "lewis.json").unlink()  # it was being removed, and the new one was moved away since
        with pytest.raises(KeyboardInterrupt), store.publish(out, {"made": "next"}):
            raise KeyboardInterrupt
        assert out.exists() is not gone and leftovers(tmp_path) == []
        assert gone or ((store.read_manifest(out) or {}).get("made") == "old" and (out / "a.txt").read_text() == "old")

    def test_an_earlier_output_goes_once_the_new_one_is_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A power failure left a new backup of empty files, and no earlier one."""
        flushed, fsync = set[str](), os.fsync

        def look(descriptor: int) -> None:
            fsync(descriptor)
            if any(tmp_path.rglob("old")):
                flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

        monkeypatch.setattr(os, "fsync", look)
        for text in ("old", "new"):
            with store.publish(tmp_path / "out", {}) as scratch:
                (scratch / "in").mkdir()
                (scratch / "in" / text).write_text(text)
        assert {"new", "in", tmp_path.name} <= flushed and not any(tmp_path.rglob("old"))

    def test_what_came_into_it_meanwhile_is_kept(self, home: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with store.publish(out, {}):
            pass
        with pytest.raises(InputError, match="holds 'mine'"), store.publish(out, {}):
            (out / "mine").touch()
        assert (out / "mine").exists()

    @pytest.mark.parametrize("kind, expected", [("file", "got a file"), ("folder", "not empty")])
    def test_touches_nothing_that_is_not_ours(self, tmp_path: Path, kind: str, expected: str) -> None:
        mine = tmp_path / "out" if kind == "file" else tmp_path / "out" / "thesis.txt"
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(InputError, match=expected), store.publish(tmp_path / "out", {}):
            pass
        assert mine.read_text() == "mine"

    def test_a_place_where_no_folder_can_be_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(InputError, match="file is no folder, or may not be written to"):
            store.check_replaceable(tmp_path / "file" / "some" / "out")

    def test_a_place_where_a_disk_is_mounted_is_refused_before_the_work(self) -> None:
        with pytest.raises(InputError, match="/proc: a disk is mounted there"):
            store.check_replaceable(Path("/proc"))

    def test_may_fill_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with store.publish(tmp_path / "out", {}):
            pass
        assert store.read_manifest(tmp_path / "out") == {"files": {}}

    def test_a_manifest_names_no_file_elsewhere(self, tmp_path: Path) -> None:
        """`lewis pull` copied it to the same place next to its own output."""
        (tmp_path / "x").write_text("evil")
        about = {"size": 4, "sha256": store.file_sha256(tmp_path / "x")}
        (tmp_path / "out").mkdir()
        for name in ("../x", str(tmp_path / "x")):
            (tmp_path / "out" / "lewis.json").write_text(sealed_json.dumps({"files": {name: about}}))
            with pytest.raises(DamagedError, match="expected the name of a file in the folder"):
                check(tmp_path / "out")

    @pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
    def test_what_was_damaged_is_not_believed(self, tmp_path: Path, damage: str) -> None:
        with store.publish(tmp_path / "out", {}) as scratch:
            (scratch / "a.txt").write_text("hello")
        if damage == "truncate":
            os.truncate(tmp_path / "out" / "a.txt", 3)
        elif damage == "remove":
            (tmp_path / "out" / "a.txt").unlink()
        else:
            (tmp_path / "out" / "lewis.json").write_text("[]")
        assert store.read_manifest(tmp_path / "out") is None

    def test_a_file_takes_the_place_of_what_a_killed_process_left(self, tmp_path: Path) -> None:
        path = tmp_path / "a[1].json"
        dead = path.with_name(f".{path.name}.{store.writer().rpartition('-')[0]}-999999999.abc.partial")
        alive = path.with_name(f".{path.name}.{store.writer()}.abc.partial")
        for leftover in (dead, alive):
            leftover.write_text("half")
        store.write_json(path, {})
        assert sorted(tmp_path.iterdir()) == sorted([alive, path])

    def test_sweeps_what_a_killed_process_left(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from lewis import store\n"
            "with store.publish(Path(sys.argv[1]), {}) as scratch:\n"
            "    (scratch / 'half').write_text('x'); os.kill(os.getpid(), 9)"
        )
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -9
        assert len(leftovers(tmp_path)) == 1
        with store.publish(tmp_path / "out", {}):
            assert len(leftovers(tmp_path)) == 1  # our own
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


class TestUse:
    """Housekeeping goes by the time that a read leaves on an entry."""

    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        store.write_entry(tmp_path / "x.json", {"norms": {"a": 1}})
        os.utime(tmp_path / "x.json", (1000, 1000))
        return tmp_path / "x.json"

    @pytest.mark.parametrize("read", [store.read_entry, lambda path: store.entry(path, "norms")])
    def test_a_read_of_an_entry_is_marked(self, old: Path, read: Any) -> None:
        assert store.read_json(old) and old.stat().st_mtime == 1000  # not every file is an entry
        assert read(old) and time.time() - old.stat().st_mtime < 60

    def test_once_an_hour(self, old: Path) -> None:
        for minutes, marked in ((59, False), (61, True)):
            then = time.time() - 60 * minutes
            os.utime(old, (then, then))
            store.mark_used(old)
            assert (old.stat().st_mtime > then + 1) == marked

    @pytest.mark.usefixtures("remembers_small_files")
    def test_a_manifest_is_marked_and_nothing_else_of_the_folder(self, home: Path, tmp_path: Path) -> None:
        with store.publish(tmp_path / "out", {}) as scratch:
            (scratch / "a.txt").write_text("hello")
        for name in ("a.txt", "lewis.json"):
            os.utime(tmp_path / "out" / name, (1000, 1000))
        time.sleep(0.15)  # a file that has just changed is not remembered
        remembered_sha256(tmp_path / "out" / "a.txt")
        (remembered,) = (home / "digests").iterdir()
        before = remembered.stat().st_ino
        assert store.read_manifest(tmp_path / "out") is not None
        assert (tmp_path / "out" / "lewis.json").stat().st_mtime > 1000
        assert remembered_sha256(tmp_path / "out" / "a.txt") and remembered.stat().st_ino == before  # not hashed again

    def test_an_absent_or_unwritable_entry_is_no_failure(self, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> None:
            raise OSError(30, "Read-only file system")

        store.mark_used(old.with_name("absent.json"))
        monkeypatch.setattr(os, "utime", refuse)
        assert store.entry(old, "norms") == {"a": 1} and old.stat().st_mtime == 1000


class TestSpace:
    def test_is_checked_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(2e9, 1e9, 10**9))
        store.check_space(tmp_path / "not" / "yet" / "there", 10**9)
        with pytest.raises(InputError, match=r"no space: the output needs 2.00 GB, 1.00 GB are free"):
            store.check_space(tmp_path, 2 * 10**9)


class TestLock:
    def test_excludes_threads(self, home: Path) -> None:
        inside, most = 0, 0

        def work() -> None:
            nonlocal inside, most
            for _ in range(20):
                with store.lock("x"):
                    inside += 1
                    most = max(most, inside)
                    inside -= 1

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1

    def test_is_freed_by_a_killed_process(self, home: Path) -> None:
        code = "import os; from lewis import store\nwith store.lock('x'): os.kill(os.getpid(), 9)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == -9
        with store.lock("x").acquire(timeout=1):
            pass


@pytest.mark.usefixtures("remembers_small_files")
class TestRememberedSha256:
    def test_sees_a_change(self, home: Path, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("one")
        os.utime(path, (1, 1))
        first = remembered_sha256(path)
        assert remembered_sha256(path) == first == store.file_sha256(path)
        path.write_text("two")
        assert remembered_sha256(path) == store.file_sha256(path) != first

    def test_needs_no_room_in_the_store(self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, asked = tmp_path / "file", list[Path]()

        def full(entry: Path, _: object) -> None:
            asked.append(entry)
            raise OSError(28, "No space left on device")

        path.write_text("one")
        monkeypatch.setattr("lewis.store.manifest._TIMESTAMP_TICK", -1)
        monkeypatch.setattr("lewis.store.manifest.write_entry", full)
        assert remembered_sha256(path) == store.file_sha256(path) and asked

    def test_is_not_read_twice(self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        path.write_text("one")
        entry = home / "digests" / f"{store.digest(str(path))[:40]}.json"
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        store.write_entry(entry, {"stamp": stamp, "sha256": "remembered"})
        assert remembered_sha256(path) == "remembered"

    def test_of_a_small_file_is_read_each_time_and_not_kept(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lewis.store.manifest._SMALL", 4)
        monkeypatch.setattr("lewis.store.manifest._TIMESTAMP_TICK", -1)
        path = tmp_path / "file"
        for text, kept in (("one", 0), ("four", 1)):
            path.write_text(text)
            assert remembered_sha256(path) == store.file_sha256(path)
            assert len([*(home / "digests").glob("*")]) == kept

    def test_takes_what_a_writer_knows_if_the_file_stays_as_it_was(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_text("one")
        remember({path: "known"})
        assert remembered_sha256(path) == store.file_sha256(path), "a small file is read as fast as remembered"
        monkeypatch.setattr("lewis.store.manifest._LARGE", 0)
        path.write_text("two")
        remember({path: "known"})
        assert time.time_ns() - path.stat().st_ctime_ns > 100_000_000  # a change from now on is seen
        assert remembered_sha256(path) == "known"
        path.write_text("six")
        assert remembered_sha256(path) == store.file_sha256(path)


def test_a_recipe_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RecipeError(["a: x", "b: y"])))
    assert error.problems == ("a: x", "b: y") and str(error) == "a: x\nb: y"
