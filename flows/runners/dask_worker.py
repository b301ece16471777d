"""The part of `lewis_flows.runners.dask` that its workers load before they load Prefect."""

from collections.abc import Mapping

from distributed import Worker, WorkerPlugin

from lewis_flows.runners import worker_environment


class Environment(WorkerPlugin):
    """Gives every worker of a cluster, also one that joins later, the flow's environment."""

    name = "lewis-environment"  # one per cluster: the next flow's replaces it

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def setup(self, worker: Worker) -> None:
        """Called in each worker."""
        _prepare(self._values)


_prepare = worker_environment.prepare
