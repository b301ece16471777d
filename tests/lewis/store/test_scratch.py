"""Temporary folders go with their process, or at the latest with the next one of the same purpose."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

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
    with scratch_folder("test") as mine:
        assert list(tmp_path.iterdir()) == [mine.parent]
    assert not list(tmp_path.iterdir())


def test_a_new_folder_and_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("lewis-test-new-a", "lewis-other-x"):  # the first is about to be locked
        (tmp_path / name).mkdir()
    (tmp_path / "lewis-test-link").symlink_to(tmp_path)
    with scratch_folder("test"):
        assert len(list(tmp_path.iterdir())) == 4
    os.utime(tmp_path / "lewis-test-new-a", (1, 1))
    with scratch_folder("test"):
        assert not (tmp_path / "lewis-test-new-a").exists() and len(list(tmp_path.iterdir())) == 3
