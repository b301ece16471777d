"""Child processes that do not outlive us: started, waited for, read, watched, stopped."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.store import kinds

_PR_SET_PDEATHSIG = 1
_READY = 180  # seconds to answer after a start
_STOP = 15  # seconds to end after SIGTERM


class Process:
    """One long-running child: its output goes to a log in the store, and line by line to `echo`.

    Attributes:
        log: `logs/<name>-<our pid>.log` in the store; `stop` removes it, so one that is left tells of a failure.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        health: str | None = None,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        """Describe it; `start` starts it.

        Args:
            name: for messages and the log.
            command: of Python, after the interpreter: `["-m", "prefect", ...]`.
            environment: on top of ours.
            health: URL that answers 200 when it is ready; None: ready at once.
            echo: called with each line it prints, from a thread.
        """
        self.name, self._command, self._environment = name, [sys.executable, *command], environment
        self._health, self._echo = health, echo
        self.log = kinds.LOGS.path(f"{name}-{os.getpid()}")

    def start(self) -> None:
        """Start it and wait until it is ready. Call from a thread that lives as long as it should.

        Raises:
            LewisError: if it ends, or does not answer, with where to read why.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with store.lock(f"{self.name}-start"):  # one start at a time: the first one migrates the database
            self._child = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **self._environment},
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                start_new_session=True,  # Ctrl-C is for us, who stop the parts in order
            )
            threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True).start()
            try:
                self._wait_until_ready()
            except BaseException:
                self._kill()
                raise

    def ended(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._child.poll()

    def stop(self) -> None:
        """End it and its own children: asked first, killed after a while."""
        if self.ended() is None:
            self._child.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_STOP)
        self._kill()
        self.log.unlink(missing_ok=True)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def _read(self, lines: "subprocess.IO[str]") -> None:  # type: ignore[name-defined]
        with self.log.open("w") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if self._echo is not None and line.strip():
                    self._echo(line.rstrip("\n"))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY
        while self._health and not answers(self._health):
            if self.ended() is not None:
                raise LewisError(f"{self.name} ended with exit code {self.ended()}; its log is {self.log}")
            if time.monotonic() > deadline:
                raise LewisError(f"{self.name} did not answer within {_READY} s; its log is {self.log}")
            time.sleep(0.1)


def answers(health: str) -> bool:
    """Whether a URL answers 200."""
    try:
        with urllib.request.urlopen(health, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def usable_port(variable: str, default: int) -> int:
    """The port that an environment variable names, or the default.

    Raises:
        InputError: if it is no port, or taken.
    """
    text = os.environ.get(variable) or str(default)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise InputError(f"{variable}: expected a port, 1 to 65535, got {text!r}")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(text))) == 0:
            raise InputError(f"127.0.0.1:{text} is taken (by another `lewis up`?); stop it, or set {variable}")
    return int(text)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
