"""Fork children from a server process that has imported their libraries already, inside the walls of `isolation`.

Importing the libraries takes longer than most of the work. CUDA does not work after a fork, so a child that uses a GPU
is forked by a server that has imported nothing. A child has a session of its own, in which a second process, its
keeper, waits for it and reports how it ended.

The children of one server are in the same namespaces, so that they see each other. Children that run code of a recipe
or a model, which get no secrets, are forked by a server of their own.

The request is one line of JSON on the child's standard input, which stays open: when the parent dies, even by SIGKILL,
the keeper sees the end of that input and kills the child and all processes that it started.
"""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import LewisError
from lewis.store import secrets
from lewis.walls.isolation import namespaces, temporary_folders

_NOT_READ_WHEN_LOADED = ("LEWIS_",)  # changing these needs no new server
_SECRET = ("prefect", "open.html", "mlflow/auth.ini")  # in the store: Prefect's database has blocks of secrets
_PATIENCE = 2.0  # seconds for a child to be killed
_guard = threading.Lock()
_servers: "dict[tuple[str, bool], _ForkServer]" = {}  # the loaded ones, by program and whether children run code


@dataclass(frozen=True)
class Program:
    """What a child runs.

    Attributes:
        module: it has a function `answer`, which reads the request and does not return.
        libraries: modules that a server imports before it forks.
    """

    module: str
    libraries: tuple[str, ...]


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
        self,
        program: Program,
        environment: Mapping[str, str],
        *,
        loaded: bool,
        network: bool,
        shown: Sequence[Path] = (),
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.started_with = _start(program, environment, network, shown)
        home = store.home()
        hidden = [*secrets.files(), *(home / name for name in _SECRET), *home.glob("mlflow/users-*.db")]
        prefix = namespaces(hidden, network=network, shown=_needed(environment, shown))
        # -P: a random.py in the working directory must not stand in for the library's
        command = [sys.executable, "-P", "-m", "lewis.walls.forked", str(theirs.fileno()), program.module]
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, *command, *(program.libraries if loaded else ())],
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
    program: Program,
    environment: Mapping[str, str],
    *,
    loaded: bool,
    network: bool,
    shown: Sequence[Path] = (),
    code: bool = False,
) -> Child:
    """Fork a child, which waits for its request.

    Args:
        program: what it runs.
        environment: in which the libraries are imported. The child's own environment is in its request.
        loaded: whether the child has the libraries imported already.
        network: whether the child reaches other machines.
        shown: files and folders among the temporary files that the child needs in addition to this Python, and to the
            folders that its variables name.
        code: whether it runs code that a recipe or a model brings, which must see no child that has a secret.

    Raises:
        LewisError: if the server does not start.
    """
    if not loaded:
        alone = _ForkServer(program, environment, loaded=False, network=network, shown=shown)
        try:
            return alone.fork()
        except OSError as error:
            raise _died(alone.output()) from error
        finally:
            alone.close()
    output, kind = "", (program.module, code)
    with _guard:
        for _ in range(2):
            server = _servers.get(kind)
            if server is None or server.started_with != _start(program, environment, network, shown):
                if server is not None:
                    server.close()
                server = _ForkServer(program, environment, loaded=True, network=network, shown=shown)
                _servers[kind] = server
            with suppress(OSError):  # it is dead: try again with a new one
                return server.fork()
            output = server.output()
            server.close()
            del _servers[kind]
    raise _died(output)


def _died(output: str) -> LewisError:
    return LewisError(f"the process that loads the libraries has died\nThe end of its output:\n{output}")


def _start(
    program: Program, environment: Mapping[str, str], network: bool, shown: Sequence[Path]
) -> tuple[object, ...]:
    """What decides whether a server can be used again: this process, variables read at import, and its namespaces."""
    read = {name: value for name, value in environment.items() if not name.startswith(_NOT_READ_WHEN_LOADED)}
    temporary = temporary_folders(_needed(environment, shown))
    return os.getpid(), program, read, secrets.files(), network, temporary


def _needed(environment: Mapping[str, str], shown: Sequence[Path]) -> list[Path]:
    """The paths that a child must be able to read, among them this Python and the paths in its variables."""
    words = (word for value in environment.values() for word in value.split(os.pathsep))
    named = (Path(word) for word in (*words, *sys.path, sys.prefix, sys.base_prefix) if os.path.isabs(word))
    return [*named, _seen(os.getpid()), store.home(), *shown]
