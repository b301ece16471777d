"""A Prefect server on loopback for as long as a command runs, where no `PREFECT_API_URL` names one."""

import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from lewis import store
from lewis.errors import LewisError

logger = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


@contextmanager
def prefect_server(timeout: float = 180) -> Iterator[str]:
    """Give the URL of a Prefect API: the user's own, or that of a server started for this block.

    The server keeps its database in the store, so the next one shows all runs; it dies with this process, however
    that ends.

    Raises:
        LewisError: if the server does not come up, with where to read why.
    """
    given = os.environ.get("PREFECT_API_URL")
    if given:
        yield given
        return
    log = store.home() / "logs" / f"prefect-server-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # One at a time: the first start migrates the database.
    with log.open("w") as output, store.lock("prefect-server-start"):
        process, url = _start(output)
        try:
            _wait(process, url, timeout, str(log))
        except BaseException:
            process.kill()
            raise
    try:
        yield url
    finally:
        _stop(process)
        log.unlink(missing_ok=True)


def _start(output: object) -> tuple[subprocess.Popen[bytes], str]:
    port = _free_port()
    environment = {**os.environ, "PREFECT_SERVER_API_HOST": "127.0.0.1", "PREFECT_SERVER_API_PORT": str(port)}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    process = subprocess.Popen(
        command,
        stdout=output,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        start_new_session=True,  # Ctrl-C is for the flow first, which still wants to report
    )
    return process, f"http://127.0.0.1:{port}/api"


def _wait(process: subprocess.Popen[bytes], url: str, timeout: float, log: str) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LewisError(f"the Prefect server ended with exit code {process.returncode}; its log is {log}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if json.load(answer) is True:
                    return
        except OSError:
            time.sleep(0.1)
    raise LewisError(f"the Prefect server did not answer within {timeout:.0f} s; its log is {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    time.sleep(1)  # let it store the last events
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
