"""Runs a command so that it, and all that it starts, ends with the process that asked for it, however that one ends.

    python guard.py PARENT GRACE COMMAND...

PARENT is the process id of who asked, GRACE how many seconds the command has to end after SIGTERM before it is killed.

The guard passes SIGTERM on. If the parent has died, which also a `kill -9` cannot hide, it sends SIGTERM itself. When
the command has ended, whatever it left running is ended too: on Linux the kernel gives orphans to the guard. If the
guard itself is killed, the kernel kills the command. The exit code is the command's; 128 + N if signal N ended it.

It is run by its path and imports only what Python has, so that it starts in milliseconds and takes little memory.
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
_ORPHANED = 5.0  # seconds of grace at most if the parent has died: nobody waits for an orderly end
_PAUSE = 0.25  # seconds between two looks for the parent; the end of a child, and SIGTERM, are noticed at once


def guarded(command: Sequence[str], grace: float) -> list[str]:
    """The command line of a guard that works for this process.

    Args:
        command: what it runs; the program is named by its path.
        grace: seconds that the command has to end after SIGTERM.
    """
    # -I and -S: the guard needs no packages, and none may shadow Python's own modules.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace), *command]


class Guard:
    """Watches one command."""

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
        """Wait for a signal, but not for long, since none comes at the end of the parent."""
        if select.select([self._signals], [], [], _PAUSE)[0]:
            os.read(self._signals, 4096)

    def _orphaned(self) -> bool:
        return os.getppid() != self._parent

    def _patience(self) -> float:
        return min(self._grace, _ORPHANED) if self._orphaned() else self._grace

    def _reap(self) -> bool:
        """Note the exit codes of children that have ended, and return whether any live.

        The orphans of the command are children too, so that without a child there is no descendant.
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
    """The processes below this one; on other systems than Linux none are found."""
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
