"""Progress from lm-eval's output, and the end of a server that loads; children are tested with the evaluations."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lewis.errors import LewisError
from lewis.evaluation.harness import process
from lewis.evaluation.harness.process import Child, _ForkServer, _Output

BAR = "\rRunning loglikelihood requests: {:3d}%|{:<10}| {}/{} [00:05<00:20,  8.53it/s]"


def seen(*lines: str) -> tuple[list[tuple[str, int, int]], str]:
    found: list[tuple[str, int, int]] = []
    output = _Output(lambda what, done, total: found.append((what, done, total)))
    text = "".join(lines).encode() + b"\n"
    for start in range(0, len(text), 7):  # it comes in pieces
        output.feed(text[start : start + 7])
    return found, output.tail()


def test_bars_become_progress_and_other_lines_are_kept() -> None:
    bars = [BAR.format(percent, "#", percent // 5, 20) for percent in (0, 0, 50, 100)]
    found, tail = seen("loading\n", "\r100%|##########| 10/10 [00:00<00:00, 99it/s]", *bars, "\nthe end")
    assert found == [("loglikelihood requests", done, 20) for done in (0, 10, 20)]
    assert tail == "loading\nthe end"


def test_the_bars_of_rolling_batches_tell_no_progress() -> None:
    batch = [BAR.format(percent, "#", percent * 16 // 100, 16) for percent in (0, 100)]
    found, _ = seen("\r100%|##########| 1500/1500 [00:00<00:00, 20956.15it/s]", *batch, *batch)
    assert found == []


def test_a_server_whose_process_was_killed_does_not_go_on_loading(tmp_path: Path) -> None:
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "evaluator.py").write_text("import time\nprint('loads', flush=True)\ntime.sleep(600)\n")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-P", "-m", "lewis.evaluation.harness.child", str(theirs.fileno()), "loaded"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with theirs:
        server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline() == b"loads\n"
    ours.close()
    server.stdout.close()
    assert server.wait(120) == 0


def test_a_server_that_dies_before_its_only_child_is_an_error_with_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("sh", "-c", "echo no memory; exit 1", "server")
    monkeypatch.setattr(process, "namespaces", lambda *_, **__: command)
    fork = _ForkServer.fork

    def fork_late(server: _ForkServer) -> Child:
        server._process.wait(120)
        return fork(server)

    monkeypatch.setattr(_ForkServer, "fork", fork_late)
    with pytest.raises(LewisError, match=r"has died\nThe end of its output:\nno memory"):
        process.new_child(dict(os.environ), loaded=False, network=False)
