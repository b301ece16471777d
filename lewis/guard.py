"""Run a command so that it and all processes that it starts end when the parent process ends, however that ends.

    python guard.py PARENT GRACE COMMAND...

PARENT is the id of the parent process, GRACE how many seconds the command has to end after SIGTERM before it is killed.

The guard passes SIGTERM on to the command. If the parent has died, even by `kill -9`, it sends SIGTERM itself. When the
command has ended, processes that it left running are ended too: on Linux the kernel gives orphans to the guard. If the
guard itself is killed, the kernel kills the command. The exit code is the command's; 128 + N if signal N ended it.

The guard is run by its path and imports only the standard library, to start in milliseconds and take little memory.
"""

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ORPHANED = 5.0  # seconds of grace at most if the parent has died, since no process waits for an orderly end
_PAUSE = 0.25  # seconds between two checks of the parent; the end of a child and SIGTERM are noticed immediately


def guarded(command: Sequence[str], grace: float) -> list[str]:
    """Return the command line of a guard that runs a command and ends it when this process ends.

    Args:
        command: the command to run; the program is named by its path.
        grace: seconds that the command has to end after SIGTERM.
    """
    # -I and -S: the guard needs no packages, and none may shadow Python's own modules.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace), *command]


class Guard:
    """The guard of one command: starts it, watches the parent, and ends the command and its descendants."""

    def __init__(self, parent: int, grace: float) -> None:
        self._parent, self._grace = parent, grace
        self._asked = False
        self._codes: dict[int, int] = {}  # exit codes of the children that have ended
        self._signals, written = os.pipe()  # Python writes a byte for each signal that has a handler
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written)

    def run(self, command: list[str]) -> int:
        """Start the command, wait until it and everything that it started has ended, and give its exit code."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        adopt_orphans()
        child = _start(command)
        sent, deadline = False, float("inf")
        while child not in self._codes:
            if not sent and (self._asked or self._orphaned()):
                sent, deadline = True, time.monotonic() + self._patience()
                os.kill(child, signal.SIGTERM)
            elif sent and self._orphaned():
                deadline = min(deadline, time.monotonic() + _ORPHANED)
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            self._wait()
            self._reap()
        self._end_the_rest()
        return self._codes[child]

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def _wait(self) -> None:
        """Wait for a signal, at most `_PAUSE` seconds, since the end of the parent sends none."""
        if select.select([self._signals], [], [], _PAUSE)[0]:
            os.read(self._signals, 4096)

    def _orphaned(self) -> bool:
        return os.getppid() != self._parent

    def _patience(self) -> float:
        return min(self._grace, _ORPHANED) if self._orphaned() else self._grace

    def _reap(self) -> bool:
        """Note the exit codes of children that have ended, and return whether any child lives.

        Orphans of the command are children too, so that without a child there is no descendant.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            code = os.waitstatus_to_exitcode(status)
            self._codes[pid] = code if code >= 0 else 128 - code

    def _end_the_rest(self) -> None:
        deadline = time.monotonic() + self._patience()
        asked: set[int] = set()
        while self._reap():
            left = descendants()  # misses a process whose parent ended while /proc was read: the next look finds it
            late = time.monotonic() > deadline
            for pid in left if late else left - asked:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            if time.monotonic() > deadline + _ORPHANED:
                return  # a process is stuck in a system call
            asked |= left
            self._wait()


def adopt_orphans() -> None:
    """Become the parent of each descendant whose parent ends; only on Linux."""
    if _LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _start(command: list[str]) -> int:
    """Start the command; a SIGTERM that comes before it runs must end it, and not reach this program's handler."""
    guard = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return child
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if _LINUX:  # this process has one thread, so the signal comes when the guard ends and not before
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == guard:
            os.execv(command[0], command)
    finally:
        os._exit(127)


def descendants() -> set[int]:
    """Return the ids of all descendants of this process; empty on other systems than Linux."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # "pid (name) state parent ..."; the name may have brackets.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    new = {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


if __name__ == "__main__":
    sys.exit(Guard(int(sys.argv[1]), float(sys.argv[2])).run(sys.argv[3:]))
