"""Tasks on a Dask cluster: an existing one by address, or one of this machine for the run."""

import logging
import time
from typing import Any

from prefect_dask import DaskTaskRunner, PrefectDaskClient
from prefect_dask.task_runners import PrefectDaskFuture

from lewis.errors import LewisError
from lewis_flows.runners import worker_environment
from lewis_flows.runners.choose import unquoted
from lewis_flows.runners.dask_worker import Environment

_STOP_SECONDS = 10.0
logging.getLogger("distributed").setLevel(logging.WARNING)  # it logs every connection


class DaskRunner(DaskTaskRunner):
    """Prefect's Dask runner; its workers get the flow's environment, and end their tasks if the flow is interrupted."""

    _prepared: PrefectDaskClient | None = None  # the client whose workers have the environment

    @property
    def client(self) -> PrefectDaskClient:
        """The client of the cluster, connected at the first use.

        Raises:
            LewisError: if no scheduler answers.
        """
        try:
            found = super().client
            if found is not self._prepared:
                found.register_plugin(Environment(worker_environment.shared_environment()))
                self._prepared = found
        except (OSError, ValueError) as error:
            place = self.address or "a cluster of this machine"
            raise LewisError(f"LEWIS_DASK_ADDRESS: no Dask scheduler at {place}: {error}; start it") from error
        return found

    def submit(self, task: Any, parameters: dict[str, Any], *arguments: Any, **named: Any) -> PrefectDaskFuture[Any]:
        """Submit a task as Prefect does, with arguments that are `unquoted`."""
        future: PrefectDaskFuture[Any] = super().submit(task, unquoted(parameters), *arguments, **named)
        return future

    def __exit__(self, exc_type: Any, *rest: Any) -> None:
        client, self._prepared = self._prepared, None
        if exc_type is not None and client is not None and self.address is None:
            client.run(worker_environment.stop)  # let the processes clean up before they are killed
            deadline = time.monotonic() + _STOP_SECONDS
            while any(client.processing().values()) and time.monotonic() < deadline:
                time.sleep(0.1)
        super().__exit__(exc_type, *rest)


def runner(address: str, workers: int) -> DaskRunner:
    """Return a runner on the cluster of the scheduler at an address, where tasks go on when the flow is interrupted.

    Without an address, it starts a cluster of `workers` processes on this machine, on loopback.
    """
    if address:
        return DaskRunner(address=address)
    return DaskRunner(
        cluster_kwargs={
            "n_workers": workers,
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "dashboard_address": "127.0.0.1:0",
            "scheduler_kwargs": {"dashboard": False},
            "memory_limit": 0,  # Dask would kill a worker whose model is larger than its share
        }
    )
