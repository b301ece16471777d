"""Children that evaluate, forked by a process that has lm-eval and transformers loaded.

To load them takes longer than many an evaluation. CUDA does not survive a fork, so a child that is to use it is forked
before anything is loaded. A child has a session of its own, with a keeper that waits for it and tells how it ended.
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

_NOT_READ_WHEN_LOADED = ("LEWIS_", "MLFLOW_", "PREFECT_", "PYTEST_")  # a nursery serves whatever these are
_guard = threading.Lock()
_nursery: "_Nursery | None" = None


class Child:
    """A process that answers one request.

    Attributes:
        stdout: the file descriptor of its output.
        returncode: as that of `subprocess.Popen`; None while it runs.
    """

    def __init__(self) -> None:
        stdin, self._stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self._status, status = os.pipe()
        self.far_ends = [stdin, stdout, status]
        self._told = b""  # by its keeper: the process group, and the exit code when it has ended
        self._over = False
        self.returncode: int | None = None

    def send(self, request: dict[str, Any]) -> None:
        """Write the request as a line of JSON; the pipe stays open."""
        data = json.dumps(request).encode() + b"\n"
        with suppress(BrokenPipeError):  # it died at once: its exit code says more
            while data:
                data = data[os.write(self._stdin, data) :]

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        while not self._over and select.select([self._status], [], [], 0)[0]:
            told = os.read(self._status, 64)
            self._told, self._over = self._told + told, not told
        _, _, code = self._told.decode().partition("\n")
        if code:
            self.returncode = int(code)
        elif self._over:  # its keeper or the nursery was killed
            self.returncode = -signal.SIGKILL
        return self.returncode

    def end(self) -> None:
        """Kill it and all that it started, and close its pipes."""
        self.poll()
        os.close(self._stdin)  # if it has hardly begun, it takes this for the death of its parent
        if group := self._told.decode().partition("\n")[0]:
            with suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)
        os.close(self.stdout)
        os.close(self._status)


class _Nursery:
    def __init__(self, environment: Mapping[str, str], *, loaded: bool) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._owner = (os.getpid(), _when_loaded(environment))
        # -P: a random.py in the working directory must not stand in for the library's
        command = [sys.executable, "-P", "-m", "lewis.evaluation.harness_child", str(theirs.fileno())]
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

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether what it has loaded is what this process would load in this environment."""
        return self._owner == (os.getpid(), _when_loaded(environment))

    def fork(self) -> Child:
        """A new child; OSError if the nursery is dead."""
        child = Child()
        try:
            socket.send_fds(self._socket, [b"."], child.far_ends)
        except OSError:
            child.end()
            raise
        finally:
            for end in child.far_ends:
                os.close(end)
        return child

    def output(self) -> str:
        """What it wrote."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace").strip() or "(none)"

    def close(self) -> None:
        """Let it end; its children live on."""
        self._socket.close()
        self._output.close()
        threading.Thread(target=self._process.wait, daemon=True).start()  # it may be loading still


def new_child(environment: Mapping[str, str], *, loaded: bool) -> Child:
    """A new child, which waits for its request.

    Args:
        environment: what the libraries are loaded in. The child takes its own from the request.
        loaded: whether it has the libraries loaded.

    Raises:
        LewisError: if the nursery does not live.
    """
    global _nursery
    if not loaded:
        alone = _Nursery(environment, loaded=False)
        try:
            return alone.fork()
        finally:
            alone.close()
    told = ""
    with _guard:
        for _ in range(2):
            if _nursery is None or not _nursery.serves(environment):
                if _nursery is not None:
                    _nursery.close()
                _nursery = _Nursery(environment, loaded=True)
            with suppress(OSError):  # it is dead: once more with a new one
                return _nursery.fork()
            told = _nursery.output()
            _nursery.close()
            _nursery = None
    raise LewisError(f"the process that loads lm-eval does not live\nThe end of its output:\n{told}")


def _when_loaded(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(_NOT_READ_WHEN_LOADED)}
