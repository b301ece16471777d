"""Children that evaluate, forked by a server process that has imported lm-eval and transformers already.

Importing them takes longer than many evaluations. CUDA does not work after a fork, so a child that uses a GPU is forked
by a server that has imported nothing. A child has a session of its own, in which a second process, its keeper, waits
for it and reports how it ended.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lewis.errors import LewisError
from lewis.evaluation.walls import walls
from lewis.store import secrets

_NOT_READ_WHEN_LOADED = ("LEWIS_",)  # changing these needs no new server
_PATIENCE = 2.0  # seconds for a child to be killed
_guard = threading.Lock()
_current: "_ForkServer | None" = None


class Child:
    """A process that answers one request.

    Attributes:
        stdout: file descriptor of its output.
        returncode: as in `subprocess.Popen`; None while it runs.
    """

    def __init__(self) -> None:
        stdin, self._stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self._status, status = os.pipe()
        self.far_ends = [stdin, stdout, status]
        self._reported = b""  # what the keeper wrote: the exit code
        self._over = False
        self.returncode: int | None = None

    def send(self, request: dict[str, Any]) -> None:
        """Write the request as a line of JSON; the pipe stays open."""
        data = json.dumps(request).encode() + b"\n"
        with suppress(BrokenPipeError):  # it died at once: its exit code tells why
            while data:
                data = data[os.write(self._stdin, data) :]

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        while not self._over and self._told_within(0):
            pass
        if self._reported:
            self.returncode = int(self._reported)
        elif self._over:  # its keeper or the server was killed
            self.returncode = -signal.SIGKILL
        return self.returncode

    def end(self) -> None:
        """Kill it and all processes that it started, and close its pipes."""
        os.close(self._stdin)  # its keeper kills them then
        while not self._over and self._told_within(_PATIENCE):
            pass
        os.close(self.stdout)
        os.close(self._status)

    def _told_within(self, seconds: float) -> bool:
        """Read what the keeper writes; whether there was something, be it the end."""
        if not select.select([self._status], [], [], seconds)[0]:
            return False
        told = os.read(self._status, 64)
        self._reported, self._over = self._reported + told, not told
        return True


class _ForkServer:
    def __init__(self, environment: Mapping[str, str], *, loaded: bool, network: bool) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        before = walls(secrets.files(), network=network)
        self._owner = (os.getpid(), _when_loaded(environment), before)
        # -P: a random.py in the working directory must not stand in for the library's
        command = [*before, sys.executable, "-P", "-m", "lewis.evaluation.harness_child", str(theirs.fileno())]
        command += ["loaded"] if loaded else []
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def serves(self, environment: Mapping[str, str], *, network: bool) -> bool:
        """Whether this process started it, behind the same walls, in the same environment as far as imports go."""
        return self._owner == (os.getpid(), _when_loaded(environment), walls(secrets.files(), network=network))

    def fork(self) -> Child:
        """A new child; OSError if the server is dead."""
        child = Child()
        try:
            try:
                socket.send_fds(self._socket, [b"."], child.far_ends)
            finally:
                for end in child.far_ends:
                    os.close(end)
        except OSError:
            child.end()
            raise
        return child

    def output(self) -> str:
        """What the server wrote to its output."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace").strip() or "(none)"

    def close(self) -> None:
        """Let the server end; its children continue."""
        self._socket.close()
        self._output.close()
        threading.Thread(target=self._process.wait, daemon=True).start()  # it may still be importing


def new_child(environment: Mapping[str, str], *, loaded: bool, network: bool) -> Child:
    """Fork a child, which waits for its request.

    Args:
        environment: in which the libraries are imported. The child's own environment is in its request.
        loaded: whether the child has the libraries imported already.
        network: whether the child reaches other machines.

    Raises:
        LewisError: if the server does not start.
    """
    global _current
    if not loaded:
        alone = _ForkServer(environment, loaded=False, network=network)
        try:
            return alone.fork()
        finally:
            alone.close()
    told = ""
    with _guard:
        for _ in range(2):
            if _current is None or not _current.serves(environment, network=network):
                if _current is not None:
                    _current.close()
                _current = _ForkServer(environment, loaded=True, network=network)
            with suppress(OSError):  # it is dead: try again with a new one
                return _current.fork()
            told = _current.output()
            _current.close()
            _current = None
    raise LewisError(f"the process that loads lm-eval does not live\nThe end of its output:\n{told}")


def _when_loaded(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(_NOT_READ_WHEN_LOADED)}
