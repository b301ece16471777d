"""The end of a server that loads; children are tested with the evaluations and the rehearsals."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lewis.errors import LewisError
from lewis.walls import fork_server
from lewis.walls.fork_server import Child, Program, _ForkServer

PROGRAM = Program("lewis.rehearsal.child", ())


def test_a_server_whose_process_was_killed_does_not_go_on_loading(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('loads', flush=True)\ntime.sleep(600)\n")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-P", "-m", "lewis.walls.forked", str(theirs.fileno()), PROGRAM.module, "slow"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with theirs:
        server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline() == b"loads\n"
    ours.close()
    server.stdout.close()
    assert server.wait(120) == 0


def test_a_server_that_dies_before_its_only_child_is_an_error_with_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("sh", "-c", "echo no memory; exit 1", "server")
    monkeypatch.setattr(fork_server, "namespaces", lambda *_, **__: command)
    fork = _ForkServer.fork

    def fork_late(server: _ForkServer) -> Child:
        server._process.wait(120)
        return fork(server)

    monkeypatch.setattr(_ForkServer, "fork", fork_late)
    with pytest.raises(LewisError, match=r"has died\nThe end of its output:\nno memory"):
        fork_server.new_child(PROGRAM, dict(os.environ), loaded=False, network=False)
