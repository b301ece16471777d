"""Tasks on a Ray cluster: an existing one by address, or one of this machine for the run."""

import os
from typing import Any, Self

from lewis import settings

# Set before Ray is imported: send no usage data, show every line of the workers' logs, and do not hide the GPUs from
# tasks that reserve none. The device slots decide which task uses a GPU.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if not settings.RAY_ADDRESS.get():
    # A cluster of this machine alone: all of it listens on loopback. Ray has no other setting for that; it is named
    # after the systems where this is the default.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from prefect_ray import RayTaskRunner
from prefect_ray.task_runners import PrefectRayFuture

from lewis.errors import LewisError
from lewis_flows.runners import worker_environment
from lewis_flows.runners.choose import unquoted

_STOP_SECONDS = 10.0


class RayRunner(RayTaskRunner):
    """Prefect's Ray runner; its workers get the flow's environment, and end their tasks if the flow is interrupted."""

    def __init__(self, address: str | None = None, init_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(address, init_kwargs)
        self._submitted: list[ray.ObjectRef[Any]] = []
        self._failure: LewisError | None = None

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except (OSError, RuntimeError, ValueError) as error:
            # Raise it when the first task is submitted: an error before the flow begins would leave the run Running.
            place = self.init_kwargs["address"]
            self._failure = LewisError(f"LEWIS_RAY_ADDRESS: no Ray cluster at {place}: {error}; start it")
            return self

    def submit(self, task: Any, parameters: dict[str, Any], *arguments: Any, **named: Any) -> PrefectRayFuture[Any]:
        """Submit a task as Prefect does, with arguments that are `unquoted`.

        Raises:
            LewisError: if no cluster answers.
        """
        if self._failure:
            raise self._failure
        future: PrefectRayFuture[Any] = super().submit(task, unquoted(parameters), *arguments, **named)
        self._submitted.append(future.wrapped_future)
        return future

    def __exit__(self, exc_type: Any, *rest: Any) -> None:
        if exc_type is not None and self._submitted:
            for task in self._submitted:
                ray.cancel(task)  # raises KeyboardInterrupt in the task's process, which cleans up
            ray.wait(self._submitted, num_returns=len(self._submitted), timeout=_STOP_SECONDS)
        if self._failure is None:
            super().__exit__(exc_type, *rest)


def runner(address: str, workers: int) -> RayRunner:
    """Return a runner on the Ray cluster at an address; `auto` is the one that runs on this machine.

    Without an address, it starts a cluster of `workers` CPUs on this machine, without a dashboard. It listens on
    loopback: see the top of this module.
    """
    values = worker_environment.shared_environment()

    def begin() -> None:
        worker_environment.prepare(values)

    local = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    place: dict[str, Any] = {"address": address} if address else local
    return RayRunner(init_kwargs={**place, "runtime_env": {"worker_process_setup_hook": begin}})
