"""Nothing in the store is swept while its writer may live: here, on another host, or in another PID namespace."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lewis import store
from lewis.store import writers

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
        ("999999999", 86000, False),  # not named by `writer`: the number alone says nothing
        ("999999999", 86800, True),
    ],
)
def test_a_number_alone_says_nothing(tmp_path: Path, writer: str, age: float, dead: bool) -> None:
    here = store.writer().rpartition("-")[0]
    path = leftover(tmp_path, writer.replace("here", here), age=age)
    store.sweep(tmp_path)
    assert path.exists() != dead


def test_a_file_written_lately_keeps_its_folder(tmp_path: Path) -> None:
    path = leftover(tmp_path, "0123456789ab-7", age=writers.AGE + 60)
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
