"""The servers of Prefect and MLflow on loopback; for one command, a Prefect server that ends with it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lewis_flows.service import note
from lewis_flows.service.processes import Process, answers, free_port


@contextmanager
def prefect_server() -> Iterator[str]:
    """Give the URL of a Prefect API: the user's own, that of `lewis up`, or one of a server started for this block.

    A server that is started keeps its database in the store, so the next one shows all runs. It ends with this process,
    even if this process is killed.

    Raises:
        LewisError: if the server does not come up; names its log.
    """
    known = note.read()
    served = known.get("prefect")
    running = os.environ.get("PREFECT_API_URL") or (served if served and answers(f"{served}/health") else None)
    if running:
        if running == served:
            os.environ.setdefault("LEWIS_MLFLOW_UI", known.get("mlflow", ""))
        yield running
        return
    server, url = prefect_process(free_port())
    server.start()
    try:
        yield url
        time.sleep(1)  # so that it stores the last events
    finally:
        server.stop()


def prefect_process(port: int, echo: Callable[[str], None] | None = None) -> tuple[Process, str]:
    """A Prefect server on loopback, not started yet, and the URL of its API."""
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_LOGGING_LEVEL": os.environ.get("PREFECT_SERVER_LOGGING_LEVEL", "WARNING"),
        # On disk, so that a server that is started again still knows which tasks hold a device.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    return Process("prefect", ["-m", "prefect", "server", "start"], environment, health=f"{url}/health", echo=echo), url


def mlflow_process(port: int, database: str, echo: Callable[[str], None] | None = None) -> tuple[Process, str]:
    """An MLflow server on loopback, not started yet, and its URL.

    Args:
        port: where it listens.
        database: URL of its database, as MLflow's `--backend-store-uri`.
        echo: as for `Process`.
    """
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--uvicorn-opts", "--log-level warning"]
    # Two processes instead of fifteen: nothing here uses MLflow's job queue.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return Process("mlflow", command, environment, health=f"{url}/health", echo=echo), url
