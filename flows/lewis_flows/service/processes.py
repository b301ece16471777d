"""Child processes: start them, wait until they answer, log their output, stop them.

Each is started by a guard, which ends it and all that it has started when this process ends, even if it is killed.
"""

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from http.client import HTTPException
from itertools import pairwise
from typing import IO

from lewis import guard, store
from lewis.errors import InputError, LewisError
from lewis.redact import redacted
from lewis.store import kinds

_READY = 420  # seconds to answer after a start; a busy machine takes minutes to import a server
_STOP = 15.0  # seconds to end after SIGTERM, before it is killed
_KEPT = 3  # logs of earlier starts
_KILLED = 15.0  # seconds to wait for a killed process to be gone
_claims: dict[int, socket.socket] = {}  # of ports, until `release` or the end of this process


class Process:
    """One long-running child process; its output goes to a log in the store, and line by line to `echo`.

    Attributes:
        log: `logs/<name>-<store.writer() of this process>.log` in the store; `stop` removes it, so it is left after a
            failure. The logs of the three starts before are kept as `<name>.1-...` to `<name>.3-...`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        health: str | None = None,
        echo: Callable[[str], None] | None = None,
        grace: float = _STOP,
        private: bool = False,
    ) -> None:
        """Describe the process; `start` starts it.

        Args:
            name: for messages and the log.
            command: arguments of the Python interpreter, such as `["-m", "prefect", ...]`.
            environment: variables in addition to those of this process.
            health: URL that answers 200 when the process is ready; None if it is ready immediately.
            echo: called with each line of its output, from a thread.
            grace: how many seconds it has to end after SIGTERM.
            private: whether only those who may read the store may read the files that it writes.
        """
        self.name, self._command, self._environment = name, [sys.executable, *command], environment
        self._health, self._echo, self._grace, self._private = health, echo, grace, private
        self.log = kinds.LOGS.path(f"{name}-{store.writer()}")

    def start(self) -> None:
        """Start the process and wait until it is ready, as `begin` and `wait`.

        Raises:
            LewisError: if it ends or does not answer in time; names its log.
        """
        self.begin()
        self.wait()

    def begin(self) -> None:
        """Start the process. No other of its name starts on this store until it is ready, as it migrates a database."""
        store.make_folder(self.log.parent)
        self._keep_logs()
        self._starting = store.lock(f"{self.name}-start")
        self._starting.acquire()
        self._child = subprocess.Popen(
            guard.guarded(self._command, self._grace),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **self._environment},
            umask=store.umask() if self._private else -1,
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the parts in order
        )
        assert self._child.stdout is not None
        threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True).start()

    def wait(self) -> None:
        """Wait until the process is ready; if it does not become ready in time, end it.

        Raises:
            LewisError: as `start`.
        """
        deadline = time.monotonic() + _READY
        try:
            while self._health and not answers(self._health):
                if self.ended() is not None:
                    raise LewisError(f"{self.name} ended with exit code {self.ended()}; its log is {self.log}")
                if time.monotonic() > deadline:
                    raise LewisError(f"{self.name} did not answer within {_READY} s; its log is {self.log}")
                time.sleep(0.1)
        except BaseException:
            self._end()
            raise
        self._starting.release()

    def _keep_logs(self) -> None:
        """Rename the logs of earlier starts; the oldest is removed."""
        names = ["", *(f".{number}" for number in range(1, _KEPT + 1))]
        logs = [kinds.LOGS.path(f"{self.name}{each}-{store.writer()}") for each in names]
        for newer, older in reversed([*pairwise(logs)]):
            if newer.exists():
                newer.replace(older)

    def ended(self) -> int | None:
        """Return the exit code of the process; None if it has not ended."""
        return self._child.poll()

    def stop(self) -> None:
        """End the process and its own children, by SIGKILL if SIGTERM does not end it in time, and remove its log."""
        self._end()
        self.log.unlink(missing_ok=True)

    def _end(self) -> None:
        if self.ended() is None:
            self._child.send_signal(signal.SIGTERM)  # the guard kills what does not end in time
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(2 * self._grace + _KILLED)
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._starting.release()

    def _read(self, lines: IO[str]) -> None:
        with suppress(OSError), ExitStack() as stack:
            log = None
            with suppress(OSError):  # a full disk, here and below: read on, or the process waits once its pipe is full
                log = stack.enter_context(self.log.open("w", encoding="utf-8"))
                store.restrict(self.log)
            for line in map(redacted, lines):
                with suppress(OSError):
                    if log:
                        log.write(line)
                        log.flush()
                with suppress(OSError):  # of the stream that `echo` prints to
                    if self._echo is not None and line.strip():
                        self._echo(line.rstrip("\n"))


def answers(health: str) -> bool:
    """Whether a URL answers 200."""
    try:
        with urllib.request.urlopen(health, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):  # where nobody listens yet, the kernel may connect a socket to itself
        return False


def free_port() -> int:
    """Return a port of loopback that nobody listens on, and claim it for this process, until `release`.

    A server needs seconds until it listens: another process that got the same port meanwhile would take the first
    server that answers for its own.
    """
    while (port := _unused_port()) in _claims or _claim(port):
        pass
    return port


def release(port: int) -> None:
    """Give up the claim of `free_port`, once the server has ended."""
    if claim := _claims.pop(port, None):
        claim.close()


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def usable_port(variable: str, text: str) -> int:
    """Return the port that a text names, if it is free, and claim it: no other process can until this one ends.

    Args:
        variable: the environment variable with the port, for error messages.
        text: its value, or the default.

    Raises:
        InputError: if the text is no port number, or the port is taken.
    """
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise InputError(f"{variable}: expected a port, 1 to 65535, got {text!r}")
    port = int(text)
    holder = _claim(port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(f"{variable}: port {port} cannot be used: {error.strerror}") from error
            holder = holder or "another `lewis up`?"
    if holder:
        raise InputError(f"127.0.0.1:{port} is taken ({holder}); stop it, or set {variable}")
    return port


def _claim(port: int) -> str:
    """Claim a port for this process; return which process has claimed it already, else an empty text.

    The process's server listens on it only seconds later. The claim is a socket with a name in the kernel (Linux),
    which is free as soon as its process has died.
    """
    if port in _claims or sys.platform != "linux":
        return ""
    claim, name = socket.socket(socket.AF_UNIX), f"\0lewis-port-{port}"
    try:
        claim.bind(name)
        claim.listen()
    except OSError:
        claim.close()
        with suppress(OSError), socket.socket(socket.AF_UNIX) as other:  # it may end just now
            other.connect(name)
            pid, _, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return f"by `lewis` in process {pid}"
        return ""
    _claims[port] = claim
    return ""
