"""lm-eval in a child process: a time limit that holds, and memory that comes back, whatever the evaluation does.

The request goes down the child's stdin as one line of JSON. The pipe stays open: when the parent dies, even by SIGKILL,
the child reads its end and kills itself and all it started. The result comes back as a file, renamed in when whole.
"""

import os
import re
import select
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lewis.errors import LewisError
from lewis.evaluation.fork_server import Child, new_child
from lewis.store import read_json

Progress = Callable[[float, str], None]
_BAR = re.compile(r"(?:Running (\w+ requests):)?\s*(\d+)%\|.*\| \d+/(\d+) \[")
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DISABLE_MULTIPROC": "1",  # lm-eval's bootstrap would fork one worker per core
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


def run(request: dict[str, Any], *, cwd: Path, timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
    """Run lm-eval in a process of its own session.

    Args:
        request: keyword arguments of `harness_child.evaluate`; `tasks` are names, `include` is a folder of task files
            (None: there are none), `defaults` says whether lm-eval's own tasks are needed.
        cwd: relative paths of data files start here.
        timeout_s: seconds until the process and all that it started are killed.
        progress: called with the fraction done of the running kind of requests, and that kind.

    Returns:
        what `harness_child.evaluate` returns.

    Raises:
        LewisError: if the time limit passes or the process fails, with the end of its output.
    """
    output = _Output(progress)
    environment = {**os.environ, **_ENVIRONMENT}
    with tempfile.TemporaryDirectory(prefix="lewis-eval-") as scratch:
        result = Path(scratch) / "result.json"
        child = new_child(environment, loaded=request["device"] == "cpu")
        try:
            child.send({**request, "cwd": str(cwd), "environment": environment, "result": str(result)})
            _watch(child, output, timeout_s)
        finally:
            child.end()
        if child.returncode == 0 and (found := read_json(result)) is not None:
            return dict(found)
        raise LewisError(f"lm-eval {_ending(child.returncode, output.tail())}\nThe end of its output:\n{output.tail()}")


def _watch(child: Child, output: "_Output", timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while child.poll() is None:
        if time.monotonic() > deadline:
            raise LewisError(
                f"lm-eval did not finish within {timeout_s:g} s and was stopped: raise the time limit, or lower "
                f"evaluate.limit\nThe end of its output:\n{output.tail()}"
            )
        ready, _, _ = select.select([child.stdout], [], [], 0.2)
        if ready and not output.feed(os.read(child.stdout, 65536)):
            time.sleep(0.05)  # it closed its output and is about to exit
    while select.select([child.stdout], [], [], 0)[0] and output.feed(os.read(child.stdout, 65536)):
        pass


class _Output:
    """What the child prints: progress bars become calls, the last lines are kept for the error message."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lines: deque[str] = deque(maxlen=30)
        self._rest = b""
        self._last: tuple[str, int] | None = None
        self._documents = 0

    def feed(self, data: bytes) -> bool:
        """Take a piece of output; False at its end."""
        *lines, self._rest = re.split(rb"[\r\n]+", self._rest + data)
        for line in (line.decode(errors="replace").strip() for line in lines):
            if bar := _BAR.fullmatch(line, endpos=line.rfind("[") + 1):
                self._bar(bar[1], int(bar[2]), int(bar[3]))
            elif line and "%|" not in line:
                self._lines.append(line)
        return bool(data)

    def _bar(self, kind: str | None, percent: int, total: int) -> None:
        if kind is None:  # of the documents of a task, before their requests run
            self._documents = total
        # Rolling requests have a bar for every batch and none for all: progress that starts anew would tell nothing.
        elif total >= self._documents and (kind, percent) != self._last:  # tqdm repeats a percentage for every batch
            self._last = (kind, percent)
            if self._progress:
                self._progress(percent / 100, kind)

    def tail(self) -> str:
        return "\n".join([*self._lines, self._rest.decode(errors="replace")]).strip() or "(none)"


def _ending(code: int | None, tail: str) -> str:
    if code is None or code >= 0:
        return f"failed (exit code {code}): {tail.splitlines()[-1]}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (": out of memory? lower evaluate.batch_size" if name == "SIGKILL" else "")
