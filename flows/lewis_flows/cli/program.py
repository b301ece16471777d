"""The entry point of `lewis`, which handles Ctrl-C from the first moment on, before the commands are imported."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, NoReturn

_PAUSE = 0.01  # seconds until a Ctrl-C that was lost is raised again


def program() -> NoReturn:
    """Run the command of this process's command line, and end the process.

    If a finaliser or a callback swallows a KeyboardInterrupt, it is raised again. During imports, Ctrl-C ends the
    process immediately: a package written in C may turn it into an ImportError, which the importing module takes for a
    missing package.
    """
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore it
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    from lewis_flows.cli import main

    if heeded:
        sys.unraisablehook, sys.excepthook = _unraisable, _printed
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main.program()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Exit immediately, without cleanup: no command has begun, only modules are being imported."""
    if sys.stderr:  # the caller may have closed it
        os.write(sys.stderr.fileno(), b"lewis: stopped\n")
    os._exit(130)  # as `main` does


def _unraisable(lost: Any) -> None:
    if lost.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, _PAUSE)
    else:
        sys.__unraisablehook__(lost)


def _printed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if kind is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, _PAUSE)
    else:
        sys.__excepthook__(kind, error, trace)
