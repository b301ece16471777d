"""Processes that have the slow libraries: forks of one Python that imported them once.

A command of `lewis` takes eight seconds of CPU until torch, transformers and MLflow are imported, and the tests start
dozens. What reads the environment while it is imported and that a test may set, Prefect and our own code but for the
compiled loops, each process still imports for itself.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lewis.quick_imports import quick_imports
from tests.support.orphans import adopted

LIBRARIES = (
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.transformers",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "datasets",
    "git",
    "peft",
    "transformers.models.llama.modeling_llama",
    "lewis.inspection.loops",
    "lewis.merging.engine.kernels",
)
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "OMP_", "HUGGINGFACE_", "NUMBA_")  # what these names begin with


class WarmPython:
    """A Python that forks; use as a context manager. Processes are children of this one, as any others are."""

    def __enter__(self) -> "WarmPython":
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[2],
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._server.wait()

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether the libraries would be the same, had they been imported with this environment."""
        return _read_at_import(environment) == _read_at_import(os.environ)

    def run(self, code: str, arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> "_Forked":
        """Run `code` as `python -c` would, its output in pipes."""
        return _Forked(self._socket, code, arguments, folder, environment)

    def exit_code(self, code: str, *arguments: object) -> int:
        """Run `code` here, as `subprocess.run([sys.executable, "-c", code, *arguments]).returncode`."""
        process = self.run(code, list(map(str, arguments)), folder=Path.cwd(), environment=os.environ)
        process.communicate()
        return process.returncode


class _Forked(subprocess.Popen[str]):
    """A process that is forked where `subprocess.Popen` would start a program."""

    def __init__(
        self, server: socket.socket, code: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self._server, self._code = server, code
        words, pipe = [sys.executable, *arguments], subprocess.PIPE
        super().__init__(words, stdout=pipe, stderr=pipe, text=True, cwd=folder, env=environment)

    def _execute_child(self, *given: Any) -> None:
        arguments, folder, environment = given[0], given[5], given[6]
        out, err = given[13], given[15]
        request = json.dumps([self._code, arguments[1:], str(folder), dict(environment)])
        with adopted():  # the one that is forked loses its parent at once
            socket.send_fds(self._server, [len(request).to_bytes(8, "little")], [out, err])
            self._server.sendall(request.encode())
            self.pid = int(self._server.recv(32))
        self._child_created = True
        os.close(out)
        os.close(err)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def _serve(messages: socket.socket) -> None:
    with quick_imports():
        for name in LIBRARIES:
            importlib.import_module(name)
    while True:
        size, ends, _, _ = socket.recv_fds(messages, 8, 2)
        if not size:
            return
        code, arguments, folder, environment = json.loads(messages.recv(int.from_bytes(size, "little")))
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == parent:
                time.sleep(0.001)
            break
        os.waitpid(between, 0)
        for end in ends:
            os.close(end)
    messages.send(str(os.getpid()).encode())
    messages.close()
    for number, end in enumerate(ends, 1):
        os.dup2(end, number)
        os.close(end)
    _become(code, arguments, folder, environment)


def _become(code: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it may have been asked for
    sys.argv = ["-c", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
