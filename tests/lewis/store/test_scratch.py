"""Temporary folders go with their process, or at the latest with the next one.

Nothing in the store is swept while its writer may live: here, on another host, or in another PID namespace.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lewis import store
from lewis.store import scratch
from lewis.store.scratch import scratch_folder

HOLD = """
import time
from lewis.store.scratch import scratch_folder
with scratch_folder("test") as folder:
    print(folder.parent, flush=True)  # still empty
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_kept(tmp_path: Path) -> None:
    living, killed = (subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) for _ in "ab")
    try:
        folders = [Path(each.stdout.readline().strip()) for each in (living, killed) if each.stdout]
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert all(folder.is_dir() for folder in folders)
        with scratch_folder("test") as mine:
            assert sorted(tmp_path.iterdir()) == sorted([folders[0], mine.parent]) and not list(mine.iterdir())
    finally:
        for each in (living, killed):
            each.kill()
            each.communicate()
    with scratch_folder("other") as mine:
        assert list(tmp_path.iterdir()) == [mine.parent], "what it was for does not matter"
    assert not list(tmp_path.iterdir())


def test_a_new_folder_and_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("lewis-tmp-new-test-a", "lewis-other-x"):  # the first is about to be locked
        (tmp_path / name).mkdir()
    (tmp_path / "lewis-tmp-link").symlink_to(tmp_path)
    with scratch_folder("test"):
        assert len(list(tmp_path.iterdir())) == 4
    os.utime(tmp_path / "lewis-tmp-new-test-a", (1, 1))
    with scratch_folder("test"):
        assert not (tmp_path / "lewis-tmp-new-test-a").exists() and len(list(tmp_path.iterdir())) == 3


NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]
NEIGHBOUR = """
import sys
from pathlib import Path
from lewis import store
folder = Path(sys.argv[1])
with store.publish(folder / "theirs", {}) as scratch:
    (scratch / "a").write_text("theirs")
    store.sweep(folder)
    print(scratch.name, flush=True)
    sys.stdin.readline()
"""


def leftover(folder: Path, writer: str, *, age: float = 0.0) -> Path:
    path = folder / f".x.{writer}.abc.partial"
    path.mkdir()
    (path / "half").write_text("half")
    then = time.time() - age
    for each in (path / "half", path):
        os.utime(each, (then, then))
    return path


@pytest.mark.parametrize(
    "writer, age, dead",
    [
        ("here-999999999", 0, True),
        ("here-1", 9e6, False),  # it runs: however long it writes nothing
        ("0123456789ab-999999999", 86000, False),  # another host, boot or namespace: nobody knows whether it runs
        ("0123456789ab-999999999", 86800, True),
        ("0123456789ab-1", 86800, True),
        ("999999999", 86800, False),  # not named by `writer`: a file of somebody else
        ("mkv", 86800, False),
    ],
)
def test_a_number_alone_says_nothing(tmp_path: Path, writer: str, age: float, dead: bool) -> None:
    here = store.writer().rpartition("-")[0]
    path = leftover(tmp_path, writer.replace("here", here), age=age)
    store.sweep(tmp_path)
    assert path.exists() != dead


def test_a_file_written_lately_keeps_its_folder(tmp_path: Path) -> None:
    path = leftover(tmp_path, "0123456789ab-7", age=scratch.AGE + 60)
    (path / "deep").mkdir()
    (path / "deep" / "new").write_text("x")
    assert not store.is_abandoned(path)


def test_host_boot_and_namespace_are_part_of_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = store.writer()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert store.writer() != ours and store.writer().endswith(f"-{os.getpid()}")


def test_two_namespaces_on_one_store_lose_nothing(home: Path) -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not permitted here")
    folder = store.make_folder(home / "merged")
    with store.publish(folder / "ours", {}) as scratch:
        (scratch / "a").write_text("ours")
        command = [*NAMESPACE, sys.executable, "-c", NEIGHBOUR, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbour:
            assert neighbour.stdin is not None and neighbour.stdout is not None
            theirs = neighbour.stdout.readline().strip()
            store.sweep(folder)
            assert sorted(path.name for path in folder.iterdir()) == sorted([scratch.name, theirs])
            neighbour.stdin.close()
        assert neighbour.returncode == 0
    for name in ("ours", "theirs"):
        assert store.read_manifest(folder / name) and (folder / name / "a").read_text() == name
