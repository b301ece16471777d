"""Choose where the tasks of a flow run, by `LEWIS_TASK_RUNNER`: in threads, processes, a Dask or a Ray cluster.

The results are the same everywhere. Tasks hand each other small references to files in the store. So the machines of a
cluster must share the store's file system, and have this package installed.
"""

import importlib
import importlib.util
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
from typing import Any

from prefect.context import TaskRunContext
from prefect.futures import PrefectConcurrentFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from lewis import private_names, settings
from lewis.errors import InputError, LewisError
from lewis_tasks.support import patience
from lewis_tasks.support.caching import STOPPING
from lewis_tasks.support.device_slot import slots

THREADS = 8


def task_runner() -> TaskRunner[Any]:
    """The runner that the environment asks for, for the decorator of a flow.

    If a setting is wrong, it is threads, and `check` raises the error inside the flow: an error while a worker loads
    the flow would leave no message in the run's state.
    """
    try:
        return _chosen()
    except InputError:
        return ThreadPoolTaskRunner(max_workers=THREADS)


def check() -> None:
    """Check all settings before a run begins to work, including those that it will need late.

    Prefect's worker starts each run in a temporary folder: there a relative path would be a store that is lost.

    Raises:
        InputError: naming the variable that is wrong, or the extra that is not installed.
    """
    settings.check()
    settings.check_absolute()
    _chosen()


def _chosen() -> TaskRunner[Any]:
    name, given = settings.TASK_RUNNER.get(), settings.MAX_WORKERS.get()
    if name == "thread":
        return ThreadPoolTaskRunner(max_workers=given or THREADS)
    # A process takes half a gigabyte for torch and Prefect. So start one for each task that may hold a device, and one
    # for the tasks that need no device.
    workers = given or max(2, slots() + 1)
    if name == "process":
        return Processes(max_workers=workers, initializer=_begin_process)
    if importlib.util.find_spec(f"prefect_{name}") is None:
        raise InputError(f"LEWIS_TASK_RUNNER={name}: not installed; run: pip install 'lewis-merge[{name}]'")
    cluster = importlib.import_module(f"lewis_flows.runners.{name}")
    address = {"dask": settings.DASK_ADDRESS, "ray": settings.RAY_ADDRESS}[name].get()
    found: TaskRunner[Any] = cluster.runner(address, workers)
    return found


def unquoted(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a task's arguments without Prefect's `quote`: Dask and Ray would pass on that tuple as a plain one."""
    return {name: value.unwrap() if isinstance(value, quote) else value for name, value in parameters.items()}


class Processes(ProcessPoolTaskRunner):
    """Prefect's process runner, whose processes end their tasks if the flow is interrupted, and end if it is killed."""

    def submit(
        self, task: Any, parameters: dict[str, Any], *arguments: Any, **named: Any
    ) -> PrefectConcurrentFuture[Any]:
        """Submit a task as Prefect does, and record which tasks its arguments come from: processes get only values."""
        inputs = private_names.PREFECT_TASK_INPUTS.get()
        named["dependencies"] = {name: inputs(value) for name, value in parameters.items()}
        return super().submit(task, parameters, *arguments, **named)

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        interrupted = multiprocessing.active_children() if exc_type is not None else []
        for process in interrupted:
            process.terminate()
        super().__exit__(exc_type, exc_value, traceback)
        for process in interrupted:
            process.kill()  # it had the time to clean up


def _begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the flow terminates its processes
    signal.signal(signal.SIGTERM, _leave)
    patience.begin(events=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # End immediately, without the orderly shutdown of torch and MLflow: the flow would wait seconds for it.
    multiprocessing.util.Finalize(None, _end, exitpriority=-100)


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave(number: int, frame: Any) -> None:
    """Handle SIGTERM: end the running task by an error, so that it cleans up; a second signal does not disturb that.

    The error is a LewisError: Prefect's runner hangs if a task ends by SystemExit or KeyboardInterrupt.
    """
    if not STOPPING.is_set():
        STOPPING.set()
        if TaskRunContext.get():
            raise LewisError("stopped")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
