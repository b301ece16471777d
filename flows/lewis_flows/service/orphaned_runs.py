"""Runs that a worker had taken when it died: not begun yet, or begun by a process that died with it."""

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, Worker, WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from lewis.evaluation import work_queue
from lewis.evaluation.work_queue import MERGES as POOL
from lewis_flows import prefect_runs
from lewis_flows.service.automations import STARTS_WITHIN
from lewis_flows.turn import mark_crashed
from lewis_tasks.support import events

logger = logging.getLogger(__name__)
EVERY = 20.0
"""Seconds between two looks for workers that have died."""

_AWAY, _BACK = 30.0, 120.0  # seconds: without an answer, heartbeats were lost; until living workers have sent new ones
_MISSED, _INTERVAL = 3, 30  # heartbeats that a dead worker has not sent; seconds between two, if it does not say
_TAKEN = ("Pending", "Submitting")  # states in which a worker starts a run's process
_WORKER = "prefect.worker.name"  # label of a run that a worker gives it a moment after it is Pending
_PROCESSES = Path("/proc")
_RUN = b"PREFECT__FLOW_RUN_ID="  # in the environment of the process that Prefect's worker starts for a run
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of the kernel's sched.h
_PATIENCE, _PAUSE = 5.0, 0.05  # seconds to wait for environments that cannot be read, and between two looks


def give_back(worker: str) -> None:
    """Schedule again the runs of the work pool that are Pending, unless another worker than `worker` may begin them.

    One that says that `worker` took it is scheduled again also while others are online. Those that are Running without
    a process are marked as Crashed, if the pool never had another worker, so that they ran here: `crash_dead_runs` does
    not know of a run that died before it took its turn. Pending or Running, a run holds its deployment's slot, and what
    is due meanwhile waits. An automation ends what is Pending, but only after ten minutes, as a machine may be busy.
    While the server does not answer, nothing is done.
    """
    begun = _with_a_process()
    try:
        with get_client(sync_client=True) as client:
            others = [each for each in client.read_workers_for_work_pool(POOL) if each.name != worker]
            alone = all(each.status != WorkerStatus.ONLINE for each in others)
            for run in prefect_runs.of_flows(client, prefect_runs.ALL, ("PENDING", "RUNNING")):
                if run.work_pool_name != POOL or run.state is None:
                    continue
                if run.state.is_pending():
                    if alone or (run.state.name in _TAKEN and run.labels.get(_WORKER) == worker):
                        _schedule_again(client, run)
                elif not others and begun is not None and str(run.id) not in begun:
                    mark_crashed(client, run)
    except httpx.HTTPError as error:
        logger.info("what the worker had taken is left as it is: %s", type(error).__name__)


def _schedule_again(client: SyncPrefectClient, run: FlowRun) -> None:
    client.set_flow_run_state(run.id, Scheduled(message="Its worker died before it began."), force=True)
    logger.info("run %s had not begun when its worker died; it is scheduled again", run.name)


class DeadWorkers:
    """Schedules again what workers of any machine had taken and not begun when they died, whichever others go on.

    Only in pools of processes: a job in a cluster begins without its worker. A worker is dead after three heartbeats
    that it has not sent. As none arrives at a server that is away, nothing is done for a while after that.
    """

    def __init__(self) -> None:
        """Look at nothing yet."""
        self._answered, self._back = float("-inf"), 0.0  # times of `time.monotonic`

    def look(self) -> None:
        """Schedule these runs again; while the server does not answer, nothing is done."""
        try:
            with get_client(sync_client=True) as client:
                orphans = [run for pool in {POOL, work_queue.pool()} for run in _of_dead_workers(client, pool)]
                before, self._answered = self._answered, time.monotonic()
                if self._answered - before > _AWAY:
                    self._back = self._answered
                for run in orphans if self._answered - self._back >= _BACK else ():
                    _schedule_again(client, run)
        except httpx.HTTPError as error:
            logger.info("what dead workers had taken is left as it is: %s", type(error).__name__)


def _of_dead_workers(client: SyncPrefectClient, pool: str) -> Iterator[FlowRun]:
    """The runs of a work pool that a dead worker has taken, and no other one since."""
    try:
        workers, now = client.read_workers_for_work_pool(pool), events.now(client)
        # Runs of those that died before STARTS_WITHIN have been ended by an automation.
        dead = [each for each in workers if _beats(each, _MISSED) < now - _heard(each) < STARTS_WITHIN]
        if not dead or client.read_work_pool(pool).type != "process":
            return
    except ObjectNotFound:
        return
    for run in prefect_runs.of_flows(client, prefect_runs.ALL, ("PENDING",), state={"name": {"any_": _TAKEN}}):
        if run.work_pool_name == pool and any(_took(worker, run) for worker in dead):
            yield run


def _took(worker: Worker, run: FlowRun) -> bool:
    """Whether a dead worker has taken a run, judged by the run's label, and by when it became Pending.

    A worker that died at once has left no label: then it is one whose last heartbeat is of that time.
    """
    assert run.state is not None
    since = run.state.timestamp - _heard(worker)
    named, about = run.labels.get(_WORKER), _beats(worker, _MISSED - 1)
    return since < about if named == worker.name else named is None and abs(since) < about


def _heard(worker: Worker) -> datetime:
    return worker.last_heartbeat_time or datetime.min.replace(tzinfo=UTC)


def _beats(worker: Worker, count: int) -> timedelta:
    """The time in which a living worker sends so many heartbeats."""
    return timedelta(seconds=count * (worker.heartbeat_interval_seconds or _INTERVAL))


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
