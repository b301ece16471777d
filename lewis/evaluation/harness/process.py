"""Run lm-eval in a child process, so that a time limit always holds and all memory is freed afterwards.

The child is forked by a server process that has imported lm-eval and transformers already: importing them takes longer
than many evaluations. CUDA does not work after a fork, so a child that uses a GPU is forked by a server that has
imported nothing. A child has a session of its own, in which a second process, its keeper, waits for it and reports how
it ended.

The children of one server are in the same namespaces, so that they see each other. Children that run code of a recipe
or a model, which get no secrets, are forked by a server of their own.

The request is one line of JSON on the child's standard input, which stays open: when the parent dies, even by SIGKILL,
the keeper sees the end of that input and kills the child and all processes that it started. The result is a file that
appears when it is complete.
"""

import atexit
import functools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lewis import store
from lewis.errors import LewisError
from lewis.evaluation.sandbox.isolation import namespaces, temporary_folders, way_to_the_hub, without_secrets
from lewis.progress import Report, silent
from lewis.store import secrets

_BAR = re.compile(r"(?:(?:Running )?(\w+ requests|Requesting API):)?\s*\d+%\|.*\| (\d+)/(\d+) \[")
_NOT_READ_WHEN_LOADED = ("LEWIS_",)  # changing these needs no new server
_SECRET = ("prefect", "open.html", "mlflow/auth.ini")  # in the store: Prefect's database has blocks of secrets
_PATIENCE = 2.0  # seconds for a child to be killed
_guard = threading.Lock()
_servers: "dict[bool, _ForkServer]" = {}  # the loaded ones, by whether their children run code of a recipe or a model


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
        child = new_child(common, loaded=no_gpu, network=network, shown=(cwd, *shown), code=code)
        try:
            child.send({**request, "cwd": str(cwd), "environment": given, "result": str(result)})
            _watch(child, output, timeout_s)
        finally:
            child.end()
        if child.returncode == 0 and (found := store.read_json(result)) is not None:
            return dict(found)
        raise LewisError(f"lm-eval {_ending(child.returncode, output.tail())}\nThe end of its output:\n{output.tail()}")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files that the children of this process see; it is removed at the end of the block."""
    with tempfile.TemporaryDirectory(dir=_seen(os.getpid())) as name:
        yield Path(name)


@functools.cache
def _seen(process: int) -> Path:
    """The only folder among the temporary files of this process that its children see; it is removed at exit."""
    held = ExitStack()
    folder = held.enter_context(store.scratch_folder("eval"))

    @atexit.register
    def remove() -> None:
        if os.getpid() == process:  # not in a process that this one forked
            held.close()

    return folder


def _watch(child: "Child", output: "_Output", timeout_s: float) -> None:
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


class Child:
    """A child of a fork server, which answers one request.

    Attributes:
        stdout: file descriptor of its output.
        returncode: as in `subprocess.Popen`; None while it runs.
    """

    def __init__(self) -> None:
        stdin, self._stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self._status, status = os.pipe()
        self.far_ends = [stdin, stdout, status]
        self._reported = b""  # what the keeper wrote: the exit code
        self._over = False
        self.returncode: int | None = None

    def send(self, request: dict[str, Any]) -> None:
        """Write the request as a line of JSON; the pipe stays open."""
        data = json.dumps(request).encode() + b"\n"
        with suppress(BrokenPipeError):  # it has died: its exit code says why
            while data:
                data = data[os.write(self._stdin, data) :]

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        while not self._over and self._reads_within(0):
            pass
        if self._reported:
            self.returncode = int(self._reported)
        elif self._over:  # its keeper or the server was killed
            self.returncode = -signal.SIGKILL
        return self.returncode

    def end(self) -> None:
        """Kill the child and all processes that it started, and close its pipes."""
        os.close(self._stdin)  # the keeper sees this, and kills them
        while not self._over and self._reads_within(_PATIENCE):
            pass
        os.close(self.stdout)
        os.close(self._status)

    def _reads_within(self, seconds: float) -> bool:
        """Read what the keeper writes; return whether bytes or the end of the pipe came in time."""
        if not select.select([self._status], [], [], seconds)[0]:
            return False
        data = os.read(self._status, 64)
        self._reported, self._over = self._reported + data, not data
        return True


class _ForkServer:
    def __init__(
        self, environment: Mapping[str, str], *, loaded: bool, network: bool, shown: Sequence[Path] = ()
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.started_with = _start(environment, network, shown)
        home = store.home()
        hidden = [*secrets.files(), *(home / name for name in _SECRET), *home.glob("mlflow/users-*.db")]
        prefix = namespaces(hidden, network=network, shown=_needed(environment, shown))
        # -P: a random.py in the working directory must not stand in for the library's
        command = [sys.executable, "-P", "-m", "lewis.evaluation.harness.child", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, *command, *(["loaded"] if loaded else [])],
                env={**environment, "TMPDIR": str(_seen(os.getpid()))},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def fork(self) -> Child:
        """A new child; OSError if the server is dead."""
        child = Child()
        try:
            try:
                socket.send_fds(self._socket, [b"."], child.far_ends)
            finally:
                for end in child.far_ends:
                    os.close(end)
        except OSError:
            child.end()
            raise
        return child

    def output(self) -> str:
        """What the server wrote to its output."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace").strip() or "(none)"

    def close(self) -> None:
        """Let the server end; its children continue."""
        self._socket.close()
        self._output.close()
        threading.Thread(target=self._process.wait, daemon=True).start()  # the server may still be importing


def new_child(
    environment: Mapping[str, str], *, loaded: bool, network: bool, shown: Sequence[Path] = (), code: bool = False
) -> Child:
    """Fork a child, which waits for its request.

    Args:
        environment: in which the libraries are imported. The child's own environment is in its request.
        loaded: whether the child has the libraries imported already.
        network: whether the child reaches other machines.
        shown, code: as for `run`.

    Raises:
        LewisError: if the server does not start.
    """
    if not loaded:
        alone = _ForkServer(environment, loaded=False, network=network, shown=shown)
        try:
            return alone.fork()
        except OSError as error:
            raise _died(alone.output()) from error
        finally:
            alone.close()
    output = ""
    with _guard:
        for _ in range(2):
            server = _servers.get(code)
            if server is None or server.started_with != _start(environment, network, shown):
                if server is not None:
                    server.close()
                server = _servers[code] = _ForkServer(environment, loaded=True, network=network, shown=shown)
            with suppress(OSError):  # it is dead: try again with a new one
                return server.fork()
            output = server.output()
            server.close()
            del _servers[code]
    raise _died(output)


def _died(output: str) -> LewisError:
    return LewisError(f"the process that loads lm-eval has died\nThe end of its output:\n{output}")


def _start(environment: Mapping[str, str], network: bool, shown: Sequence[Path]) -> tuple[object, ...]:
    """What decides whether a server can be used again: this process, variables read at import, and its namespaces."""
    read = {name: value for name, value in environment.items() if not name.startswith(_NOT_READ_WHEN_LOADED)}
    temporary = temporary_folders(_needed(environment, shown))
    return os.getpid(), read, secrets.files(), network, temporary


def _needed(environment: Mapping[str, str], shown: Sequence[Path]) -> list[Path]:
    """The paths that a child must be able to read, among them this Python and the paths in its variables."""
    words = (word for value in environment.values() for word in value.split(os.pathsep))
    named = (Path(word) for word in (*words, *sys.path, sys.prefix, sys.base_prefix) if os.path.isabs(word))
    return [*named, _seen(os.getpid()), store.home(), *shown]
