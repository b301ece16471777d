"""The Prefect and MLflow servers on loopback: for one command, or in the foreground with `lewis up`."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lewis import store
from lewis.errors import InputError, LewisError

_PR_SET_PDEATHSIG = 1


@contextmanager
def prefect_server(port: int | None = None) -> Iterator[str]:
    """Give the URL of a Prefect API: the user's own, that of `lewis up`, or of a server started for this block.

    The server keeps its database in the store, so the next one shows all runs; it dies with this process, however
    that ends.

    Args:
        port: where to listen; by default, on a free port.

    Raises:
        LewisError: if the server does not come up, with where to read why.
    """
    running = os.environ.get("PREFECT_API_URL") or (None if port else _running_server())
    if running:
        yield running
        return
    port = port or _free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {"PREFECT_SERVER_API_HOST": "127.0.0.1", "PREFECT_SERVER_API_PORT": str(port)}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    with _server("prefect", command, environment, f"{url}/health"):
        yield url
        time.sleep(1)  # let it store the last events


def up(started: Callable[[str, str], None]) -> None:
    """Run both servers until Ctrl-C; commands in other terminals find them.

    Args:
        started: called with the URLs of Prefect and MLflow when both answer.

    Raises:
        InputError: if a port is taken.
        LewisError: if a server does not come up.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background job of a shell starts with it ignored
        signal.signal(number, signal.default_int_handler)
    with prefect_server(_usable("PREFECT_SERVER_API_PORT", 4200)) as api, _mlflow_server() as mlflow:
        note = _note()
        store.write_json(note, {"prefect": api, "pid": os.getpid()})
        try:
            started(api.removesuffix("/api"), mlflow)
            signal.pause()
        finally:
            note.unlink(missing_ok=True)


@contextmanager
def _mlflow_server() -> Iterator[str]:
    from lewis import registry

    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if given.startswith("http"):
        yield given
        return
    registry.configure()
    database = given or f"sqlite:///{store.home() / 'mlflow' / 'mlflow.db'}"
    port = _usable("MLFLOW_PORT", 5000)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", database]
    # Two processes instead of fifteen: nothing here uses MLflow's job queue.
    with _server("mlflow", command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, f"{url}/health"):
        yield url


def _usable(variable: str, default: int) -> int:
    port = int(os.environ.get(variable, default))
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise InputError(f"127.0.0.1:{port} is taken (by another `lewis up`?); stop it, or set {variable}")
    return port


@contextmanager
def _server(name: str, command: Sequence[str], environment: Mapping[str, str], health: str) -> Iterator[None]:
    log = store.home() / "logs" / f"{name}-server-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        with store.lock(f"{name}-server-start"):  # one start at a time: the first one migrates the database
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                start_new_session=True,  # Ctrl-C is for the flow first, which still wants to report
            )
            try:
                _wait(name, process, health, log)
            except BaseException:
                process.kill()
                raise
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    log.unlink(missing_ok=True)


def _wait(name: str, process: subprocess.Popen[bytes], health: str, log: Path, timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LewisError(f"the {name} server ended with exit code {process.returncode}; its log is {log}")
        if _answers(health):
            return
        time.sleep(0.1)
    raise LewisError(f"the {name} server did not answer within {timeout:.0f} s; its log is {log}")


def _answers(health: str) -> bool:
    try:
        with urllib.request.urlopen(health, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _running_server() -> str | None:
    url = (store.read_json(_note()) or {}).get("prefect")
    return url if url and _answers(f"{url}/health") else None


def _note() -> Path:
    return store.home() / "service.json"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
