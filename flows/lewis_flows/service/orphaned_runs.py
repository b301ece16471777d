"""Recover the runs that a worker had taken when it died: those not begun yet, and those whose process died too."""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
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
"""Seconds between two checks for workers that have died."""

_AWAY, _BACK = 30.0, 120.0  # seconds: of an outage that loses heartbeats; until living workers have sent new ones
_MISSED, _INTERVAL = 3, 30  # heartbeats that a dead worker has missed; seconds between two, if the worker states none
_TAKEN = ("Pending", "Submitting")  # states in which a worker starts a run's process
_WORKER = "prefect.worker.name"  # label that a worker gives a run a moment after the run is Pending
_PROCESSES = Path("/proc")
_RUN = b"PREFECT__FLOW_RUN_ID="  # in the environment of the process that Prefect's worker starts for a run
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of the kernel's sched.h
_PATIENCE, _PAUSE = 5.0, 0.05  # seconds to wait for environments that cannot be read, and between two attempts


def give_back(worker: str) -> None:
    """Schedule the Pending runs of a dead worker again, and mark its Running runs without a process as Crashed.

    A Pending run of the work pool counts if no other worker is online, or if its label says that `worker` took it. A
    Running one counts if the pool never had another worker, so that it ran here: `crash_dead_runs` does not know of a
    run that died before it took its turn. Both hold the slot of their deployment, so that its next runs wait. An
    automation ends Pending runs too, but only after ten minutes, as a machine may be busy. If the server does not
    answer, nothing is done.
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
    with suppress(ObjectNotFound):  # somebody deleted it
        client.set_flow_run_state(run.id, Scheduled(message="Its worker died before it began."), force=True)
    logger.info("run %s had not begun when its worker died; it is scheduled again", run.name)


class DeadWorkers:
    """Schedules runs again that workers of any machine had taken and not begun when they died, even if others live.

    It does so only in pools of processes: a job in a cluster begins without its worker. A worker is dead once it has
    missed three heartbeats. As none reaches a server that is down, nothing is done for two minutes after an outage.
    """

    def __init__(self) -> None:
        """Begin as after an outage of the server: no run is scheduled again in the first two minutes."""
        self._answered, self._back = float("-inf"), 0.0  # times of `time.monotonic`

    def look(self) -> None:
        """Schedule the runs of dead workers again; if the server does not answer, do nothing."""
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
        # An automation has ended the runs of the workers that died longer than STARTS_WITHIN ago.
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

    A worker that died right after it took the run has left no label: then its last heartbeat has to be of that time.
    """
    assert run.state is not None
    since = run.state.timestamp - _heard(worker)
    named, about = run.labels.get(_WORKER), _beats(worker, _MISSED - 1)
    return since < about if named == worker.name else named is None and abs(since) < about


def _heard(worker: Worker) -> datetime:
    return worker.last_heartbeat_time or datetime.min.replace(tzinfo=UTC)


def _beats(worker: Worker, count: int) -> timedelta:
    """Return the time in which a living worker sends `count` heartbeats."""
    return timedelta(seconds=count * (worker.heartbeat_interval_seconds or _INTERVAL))


def _with_a_process() -> set[str] | None:
    """Return the ids of the runs that have a living process on this machine; None if that cannot be found out.

    A process whose environment cannot be read now may be any run's: it is read again, for `_PATIENCE` seconds.
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

    Empty if the process has none, has ended, or is no run since it is another user's or has rights that this process
    lacks. None if it cannot be read now: while a process loads its program (execve), its environment reads as empty.
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
