"""The fork server of `lewis.walls.fork_server`: `python -m lewis.walls.forked SOCKET PROGRAM LIBRARY...`.

It imports the libraries, then forks a child for each message on the socket, which carries three file descriptors: the
child's standard input and output, and the pipe of its keeper. The child calls the function `answer` of the module
PROGRAM. The request is one line of JSON on the standard input, which stays open: when it ends, the child is killed.
"""

import importlib
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lewis import guard
from lewis.quick_imports import quick_imports


def main(descriptor: str, program: str, *libraries: str) -> None:
    """Fork a child for each message, which answers its request, until the socket is closed."""
    answer = importlib.import_module(program).answer
    with socket.socket(fileno=int(descriptor)) as messages:
        with _ending_with(messages):
            for name in libraries:
                with suppress(ImportError), quick_imports():  # the child will report it
                    importlib.import_module(name)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: nothing waits for the keepers
        keepers: list[int] = []
        while True:
            _, ends, _, _ = socket.recv_fds(messages, 1, 3)
            if not ends:
                for keeper in keepers:  # they would end with this first process of the namespace
                    with suppress(ChildProcessError):
                        os.waitpid(keeper, 0)
                return
            if (keeper := os.fork()) == 0:
                break
            keepers.append(keeper)
            for end in ends:
                os.close(end)
    _become_child(*ends)
    answer()


@contextmanager
def _ending_with(messages: socket.socket) -> Iterator[None]:
    """In the block, end this process once the other end of a socket is closed and nothing is left to be read."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if select.select([messages], [], [], 0)[0]:
                if not messages.recv(1, socket.MSG_PEEK):
                    os._exit(0)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _become_child(stdin: int, stdout: int, status: int) -> None:
    """Fork: the new process returns, and this one becomes its keeper.

    The keeper waits for it and reports how it ended. Then, or earlier if the parent is dead or has closed the child's
    input, it kills the child, all processes that the child started, also in sessions of their own, and itself.
    """
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    guard.adopt_orphans()
    child = os.fork()
    if child:
        os.close(stdout)
        threading.Thread(target=_kill_at_end, args=(stdin,), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(status, str(code).encode())
        with suppress(ChildProcessError):
            while True:  # the children of each that ends come to this process
                _kill_descendants()
                os.waitpid(-1, 0)
        os.killpg(0, signal.SIGKILL)
    for end, place in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(end, place)
    for end in (stdin, stdout, status):
        os.close(end)


def _kill_at_end(stdin: int) -> None:
    """Wait until no one can write to a pipe, whose bytes the child reads, then kill all that this process started."""
    poll = select.poll()
    poll.register(stdin, 0)  # the end of a pipe is always reported
    poll.poll()
    _kill_descendants()


def _kill_descendants() -> None:
    for pid in guard.descendants():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
