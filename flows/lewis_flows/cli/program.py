"""The program `lewis`: what Ctrl-C does from its first moment on, before the commands are imported."""

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

_PAUSE = 0.05  # seconds until a Ctrl-C that came in an import is tried again


def program() -> NoReturn:
    """Run the command of this process's command line, and end the process."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore it
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    from lewis_flows.cli import main

    if heeded:
        interrupt = Interrupt()
        sys.unraisablehook = interrupt.unraisable
        signal.signal(signal.SIGALRM, interrupt)
        signal.signal(signal.SIGINT, interrupt)
    main.program()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """There is nothing to clean up yet."""
    if sys.stderr:  # the caller may have closed it
        os.write(sys.stderr.fileno(), b"lewis: stopped\n")
    os._exit(130)  # as `main` does


class Interrupt:
    """Signal handler that raises KeyboardInterrupt where it is not lost.

    During an import it waits for the end: packages written in C print the error and go on, or report that a package is
    missing. A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self._asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, or try again soon."""
        again, self._asked = self._asked and number == signal.SIGINT, True
        while frame and not again:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                signal.setitimer(signal.ITIMER_REAL, _PAUSE)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    def unraisable(self, lost: Any) -> None:
        """`sys.unraisablehook`: raise it again where a finaliser, or a callback, would have lost it."""
        if lost.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _PAUSE)
        else:
            sys.__unraisablehook__(lost)
