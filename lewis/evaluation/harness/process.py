"""Run lm-eval in a child process, so that a time limit always holds and all memory is freed afterwards.

The result is a file that appears when it is complete.
"""

import os
import re
import select
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lewis import store
from lewis.errors import LewisError
from lewis.progress import Report, silent
from lewis.walls.fork_server import Child, Program, new_child, scratch_folder
from lewis.walls.isolation import way_to_the_hub, without_secrets

_BAR = re.compile(r"(?:(?:Running )?(\w+ requests|Requesting API):)?\s*\d+%\|.*\| (\d+)/(\d+) \[")
# What every evaluation imports; the last takes most of the time.
LM_EVAL = Program(
    "lewis.evaluation.harness.child",
    (
        "lm_eval.evaluator",
        "lm_eval.models.huggingface",
        "accelerate",
        "transformers.models.llama.modeling_llama",
    ),
)


def run(
    request: dict[str, Any],
    *,
    cwd: Path,
    network: bool,
    hub: bool,
    token: bool,
    code: bool,
    timeout_s: float,
    environment: Mapping[str, str] = MappingProxyType({}),
    shown: Sequence[Path] = (),
    progress: Report = silent,
) -> dict[str, Any]:
    """Run lm-eval in a child process with a session of its own.

    Args:
        request: keyword arguments of `child.evaluate`.
        cwd: working folder of the child; relative paths of data files start here.
        network: whether the child has the network of this machine.
        hub: whether it gets the variables to reach the Hub, proxies included.
        token: whether it gets the Hub's token. It gets no other secret of this process's environment.
        code: whether it runs code that a recipe or a model brings, which must see no child that has a secret.
        timeout_s: seconds until the process and all processes that it started are killed.
        environment: further variables of the child.
        shown: files and folders among the temporary files that the child needs in addition to `cwd`, to this Python,
            and to the folders that its variables name.
        progress: called with the kind of requests that is running, how many are done, and how many there are.

    Returns:
        what `child.evaluate` returns.

    Raises:
        LewisError: if the time limit passes or the process fails, with the end of its output.
    """
    from huggingface_hub import get_token  # brings the Hub's client with it

    output = _Output(progress)
    common = without_secrets(os.environ) | (way_to_the_hub(os.environ) if hub else {})
    secret = get_token() if token else None
    given = common | ({"HF_TOKEN": secret} if secret else {}) | dict(environment)
    with scratch_folder() as scratch:
        result, given["TMPDIR"] = scratch / "result.json", str(scratch)
        no_gpu = request["device"] == "cpu" or request["model"].startswith("local-")
        child = new_child(LM_EVAL, common, loaded=no_gpu, network=network, shown=(cwd, *shown), code=code)
        try:
            child.send({**request, "cwd": str(cwd), "environment": given, "result": str(result)})
            _watch(child, output, timeout_s)
        finally:
            child.end()
        if child.returncode == 0 and (found := store.read_json(result)) is not None:
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
