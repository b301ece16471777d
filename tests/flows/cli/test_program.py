"""Ctrl-C at any time: exit code 130, and no traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LEWIS = """
import sys, time
sys.path.insert(0, {folder!r})
class Finaliser:
    def __del__(self):
        import signal
        signal.raise_signal(signal.SIGINT)
def load():
    try:
        import package_that_loses
    except ImportError:
        pass
def work(*_):
    {how}
    time.sleep({seconds})
    print("worked all the same")
from lewis.registry import history
history.history = work
sys.argv[1:] = ["history", "m"]
from lewis_flows.cli.program import program
print("starts", flush=True)
program()
"""
PACKAGE = """
import signal, sys
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    sys.excepthook(*sys.exc_info())  # as PyErr_Print does
    raise ImportError("multiarray failed to import")
"""


def start(folder: Path, how: str, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LEWIS.format(folder=str(folder), how=how, seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the shell ignores it
    )


@pytest.mark.parametrize(
    "seconds", [0.03, 0.2, 0.8, *(pytest.param(seconds, marks=pytest.mark.long) for seconds in (0.1, 0.4))]
)
def test_while_the_commands_are_loaded(tmp_path: Path, seconds: float) -> None:
    """It was a traceback."""
    with start(tmp_path, "pass", 60) as process:
        assert process.stdout and process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "") and err.startswith("lewis: stopped"), err


@pytest.mark.parametrize("how", ["load()", "Finaliser()"])
def test_where_a_package_or_a_finaliser_would_lose_it(tmp_path: Path, how: str) -> None:
    """A traceback was printed, and the merge went on to its end."""
    (tmp_path / "package_that_loses.py").write_text(PACKAGE)
    with start(tmp_path, how, 1) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "starts\n") and err.startswith("lewis: stopped"), err
