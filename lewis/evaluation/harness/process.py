"""Run lm-eval in a child process, so that a time limit always holds and all memory is freed afterwards.

The request is one line of JSON on the child's standard input, which stays open: when the parent dies, even by SIGKILL,
the child's keeper sees the end of that input and kills the child and all processes that it started. The result is a
file that appears when it is complete.
"""

import os
import re
import select
import signal
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import get_token

from lewis.errors import LewisError
from lewis.evaluation.child_environment import way_to_the_hub, without_secrets
from lewis.evaluation.harness.fork_server import Child, new_child
from lewis.progress import Report, silent
from lewis.store import read_json, scratch_folder

_BAR = re.compile(r"(?:(?:Running )?(\w+ requests|Requesting API):)?\s*\d+%\|.*\| (\d+)/(\d+) \[")


def run(
    request: dict[str, Any],
    *,
    cwd: Path,
    network: bool,
    token: bool,
    timeout_s: float,
    hub: bool | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    progress: Report = silent,
) -> dict[str, Any]:
    """Run lm-eval in a process of its own session.

    Args:
        request: keyword arguments of `child.evaluate`.
        cwd: working folder of the child; relative paths of data files start here.
        network: whether the child has the network of this machine.
        hub: whether it is told the way to the Hub; by default if it has the network.
        token: whether it gets the Hub's token. It gets no other secret of this process's environment.
        timeout_s: seconds until the process and all processes that it started are killed.
        environment: further variables of the child.
        progress: called with the kind of requests that is running, how many are done, and how many there are.

    Returns:
        what `child.evaluate` returns.

    Raises:
        LewisError: if the time limit passes or the process fails, with the end of its output.
    """
    output = _Output(progress)
    way = way_to_the_hub(os.environ) if (network if hub is None else hub) else {}
    common = without_secrets(os.environ) | way
    found = get_token() if token else None
    given = common | ({"HF_TOKEN": found} if found else {}) | dict(environment)
    with scratch_folder("eval") as scratch:
        result = scratch / "result.json"
        no_gpu = request["device"] == "cpu" or request["model"].startswith("local-")
        child = new_child(common, loaded=no_gpu, network=network)
        try:
            child.send({**request, "cwd": str(cwd), "environment": given, "result": str(result)})
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
    """The output of the child: progress bars become calls, the last lines are kept for an error message."""

    def __init__(self, progress: Report) -> None:
        self._progress = progress
        self._lines: deque[str] = deque(maxlen=30)
        self._rest = b""
        self._last: tuple[str, int] | None = None
        self._documents = 0

    def feed(self, data: bytes) -> bool:
        """Take the next bytes of output; False at its end."""
        *lines, self._rest = re.split(rb"[\r\n]+", self._rest + data)
        for line in (line.decode(errors="replace").strip() for line in lines):
            if bar := _BAR.fullmatch(line, endpos=line.rfind("[") + 1):
                self._bar(bar[1], int(bar[2]), int(bar[3]))
            elif line and "%|" not in line:
                self._lines.append(line)
        return bool(data)

    def _bar(self, kind: str | None, done: int, total: int) -> None:
        if kind is None:  # the bar over a task's documents, which comes before their requests
            self._documents = total
        # Rolling requests have one bar per batch and none for the whole: those bars, which begin again, are left out.
        elif total >= self._documents and (kind, done) != self._last:  # tqdm repeats the same number
            self._last = (kind, done)
            self._progress(kind, done, total)

    def tail(self) -> str:
        return "\n".join([*self._lines, self._rest.decode(errors="replace")]).strip() or "(none)"


def _ending(code: int | None, tail: str) -> str:
    if code is None or code >= 0:
        return f"failed (exit code {code}): {tail.splitlines()[-1]}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (": out of memory? lower evaluate.batch_size" if name == "SIGKILL" else "")
