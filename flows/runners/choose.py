"""Where the tasks of a flow run: threads, processes, a Dask or a Ray cluster, by `LEWIS_TASK_RUNNER`.

All of them take the same tasks and give the same results. Tasks hand each other small references; the models are on a
file system, so the machines of a cluster share that of the store, and have this package installed.
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
from prefect.utilities.engine import collect_task_run_inputs_sync

from lewis.errors import InputError, LewisError
from lewis_tasks.support.caching import STOPPING
from lewis_tasks.support.device_slot import slots

RUNNERS = ("thread", "process", "dask", "ray")
THREADS = 8


def task_runner() -> TaskRunner[Any]:
    """The runner of the environment's settings, for the decorator of a flow.

    Where they are wrong it is threads, and `check` tells in the flow: what fails while a flow is loaded by a worker
    leaves no message in the run's state.
    """
    try:
        return _chosen()
    except InputError:
        return ThreadPoolTaskRunner(max_workers=THREADS)


def check() -> None:
    """Check the settings.

    Raises:
        InputError: naming the variable that is wrong, or the extra that is not installed.
    """
    _chosen()


def _chosen() -> TaskRunner[Any]:
    name = os.environ.get("LEWIS_TASK_RUNNER") or "thread"
    if name not in RUNNERS:
        raise InputError(f"LEWIS_TASK_RUNNER: expected {', '.join(RUNNERS)}, got {name!r}; set or unset it")
    given = os.environ.get("LEWIS_MAX_WORKERS", "")
    if given and (not given.isdecimal() or int(given) == 0):
        raise InputError(f"LEWIS_MAX_WORKERS: expected a whole number from 1 up, got {given!r}; set or unset it")
    if name == "thread":
        return ThreadPoolTaskRunner(max_workers=int(given or THREADS))
    # A process holds torch and Prefect, half a gigabyte: as many as may compute, and one for what needs no device.
    workers = int(given or max(2, slots() + 1))
    if name == "process":
        return Processes(max_workers=workers, initializer=_begin_process)
    if importlib.util.find_spec(f"prefect_{name}") is None:
        raise InputError(f"LEWIS_TASK_RUNNER={name}: not installed; run: pip install 'lewis-merge[{name}]'")
    cluster = importlib.import_module(f"lewis_flows.runners.{name}")
    address = os.environ.get(f"LEWIS_{name.upper()}_ADDRESS")
    runner: TaskRunner[Any] = cluster.existing(address) if address else cluster.local(workers)
    return runner


def unquoted(parameters: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a task without Prefect's `quote`, which is a tuple: Dask and Ray would hand over a plain one."""
    return {name: value.unwrap() if isinstance(value, quote) else value for name, value in parameters.items()}


class Processes(ProcessPoolTaskRunner):
    """Prefect's, whose processes end their tasks when the flow is interrupted, and end with it when it is killed."""

    def submit(
        self, task: Any, parameters: dict[str, Any], *arguments: Any, **named: Any
    ) -> PrefectConcurrentFuture[Any]:
        """As Prefect's, and it notes which tasks the arguments come from: the process is handed plain values."""
        named["dependencies"] = {name: collect_task_run_inputs_sync(value) for name, value in parameters.items()}
        return super().submit(task, parameters, *arguments, **named)

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        interrupted = multiprocessing.active_children() if exc_type is not None else []
        for process in interrupted:
            process.terminate()
        super().__exit__(exc_type, exc_value, traceback)
        for process in interrupted:
            process.kill()  # they have had their time to clean up


def _begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the flow, which then terminates its processes
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The last thing it does: to take torch and MLflow apart, piece by piece, would keep the flow waiting for seconds.
    multiprocessing.util.Finalize(None, _end, exitpriority=-100)


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave(number: int, frame: Any) -> None:
    """End the running task, so that it cleans up; once, not again while it does.

    By an error of ours: Prefect's runner hangs where a process ends a task by SystemExit or KeyboardInterrupt.
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
