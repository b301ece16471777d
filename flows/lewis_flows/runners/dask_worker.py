"""What Dask workers load before they load Prefect, which reads the environment when it is imported."""

from collections.abc import Mapping

from distributed import Worker, WorkerPlugin

from lewis_flows.runners import worker_environment


class Environment(WorkerPlugin):
    """Gives the flow's environment to every worker of a cluster, also to those that join later."""

    name = "lewis-environment"  # a cluster keeps one plug-in of a name: the next flow replaces it

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def setup(self, worker: Worker) -> None:
        """Prepare a worker; Dask calls this in each one."""
        worker_environment.prepare(self._values)
