"""Runs that a worker had taken when it died: not begun yet, or begun by a process that died with it."""

import logging
import time
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.states import Scheduled

from lewis.evaluation.work_queue import MERGES as POOL
from lewis_flows import prefect_runs
from lewis_flows.turn import mark_crashed

logger = logging.getLogger(__name__)
_PROCESSES = Path("/proc")
_RUN = b"PREFECT__FLOW_RUN_ID="  # in the environment of the process that Prefect's worker starts for a run
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of the kernel's sched.h
_PATIENCE, _PAUSE = 5.0, 0.05  # seconds to wait for environments that cannot be read, and between two looks


def give_back(worker: str) -> None:
    """Schedule again the runs of the work pool that are Pending, unless another worker than `worker` may begin them.

    Those that are Running without a process are marked as Crashed, if the pool never had another worker, so that they
    ran here: `crash_dead_runs` does not know of a run that died before it took its turn. Pending or Running, a run
    holds its deployment's slot, and what is due meanwhile waits. An automation ends what is Pending,
    but only after ten minutes, as a machine may be busy. While the server does not answer, nothing is done.
    """
    begun = _with_a_process()
    try:
        with get_client(sync_client=True) as client:
            others = [each for each in client.read_workers_for_work_pool(POOL) if each.name != worker]
            if any(each.status == WorkerStatus.ONLINE for each in others):
                return
            for run in prefect_runs.of_flows(client, prefect_runs.ALL, ("PENDING", "RUNNING")):
                if run.work_pool_name != POOL or run.state is None:
                    continue
                if run.state.is_pending():
                    client.set_flow_run_state(run.id, Scheduled(message="Its worker died before it began."), force=True)
                    logger.info("run %s had not begun when its worker died; it is scheduled again", run.name)
                elif not others and begun is not None and str(run.id) not in begun:
                    mark_crashed(client, run)
    except httpx.HTTPError as error:
        logger.info("what the worker had taken is left as it is: %s", type(error).__name__)


def _with_a_process() -> set[str] | None:
    """The ids of the runs that a worker of this machine has started and that live; None if that cannot be known.

    A process whose environment cannot be read now may be any run's: it is asked again, for `_PATIENCE` seconds.
    """
    if not (_PROCESSES / "self" / "environ").exists():
        return None
    found: set[str] = set()
    unknown = list(_PROCESSES.glob("[0-9]*"))
    deadline = time.monotonic() + _PATIENCE
    while True:
        environments = {process: _environment(process) for process in unknown}
        variables = b"\0".join(each for each in environments.values() if each).split(b"\0")
        found |= {each.removeprefix(_RUN).decode() for each in variables if each.startswith(_RUN)}
        unknown = [process for process, environment in environments.items() if environment is None]
        if not unknown:
            return found
        if time.monotonic() > deadline:
            numbers = ", ".join(process.name for process in unknown)
            logger.warning("the environment of process %s cannot be read; no run is marked as Crashed", numbers)
            return None
        time.sleep(_PAUSE)


def _environment(process: Path) -> bytes | None:
    """The environment of a process, by its folder in /proc.

    Empty if it has none, has ended, or is no run: another user's, or with rights that this process lacks. None if it
    lives and cannot be read now: while a process loads its program (execve), its environment reads as empty.
    """
    try:
        if environment := (process / "environ").read_bytes():
            return environment
        # "pid (name) state ..."; the name may have brackets. Numbers of the fields: proc_pid_stat(5), from state = 3.
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    except OSError:
        return None
    state, flags, start, end = fields[0], int(fields[9 - 3]), int(fields[50 - 3]), int(fields[51 - 3])
    return b"" if state in "ZX" or flags & _KERNEL_THREAD or 0 < start == end else None
