"""Device slots: how many tasks may use torch at once, on one machine and on all that share a Prefect server."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_API_URL

from lewis.device import devices
from lewis.errors import InputError
from tasks.caching import raise_if_stopping

logger = logging.getLogger(__name__)
LIMIT = "lewis-device"
"""Name of Prefect's global concurrency limit over all machines. Where there is none, each machine's slots are all."""
LEASE_SECONDS = 60.0  # the least that Prefect takes: how long a killed holder keeps its part of the limit
_POLL_SECONDS = 0.1
_ASK_SECONDS = 5.0


def slots() -> int:
    """How many tasks may hold a device of this machine at once: `LEWIS_DEVICE_SLOTS`, by default its GPUs, or 1.

    Raises:
        InputError: if the variable is no positive number.
    """
    given = os.environ.get("LEWIS_DEVICE_SLOTS", "")
    if not given:
        return len(devices())
    if not given.isdecimal() or int(given) == 0:
        raise InputError(f"LEWIS_DEVICE_SLOTS: expected a whole number from 1 up, got {given!r}; set or unset it")
    return int(given)


@contextmanager
def device_slot() -> Iterator[str]:
    """Hold one of this machine's slots while torch works; gives the device's name, `cpu` or `cuda:<i>`.

    The slot is a kernel lock: a killed holder's is free at once. While it is held, a part of the limit `lewis-device`
    is held too, if the Prefect server has one; of a killed holder, that is free after its lease.

    Raises:
        LewisError: if the process was told to stop while it waited.
    """
    names = devices()
    with _machine_slot() as number, _shared_limit():
        yield names[number % len(names)]


@contextmanager
def _machine_slot() -> Iterator[int]:
    places = [Path(tempfile.gettempdir()) / f"lewis-device-{os.getuid()}-{number}.lock" for number in range(slots())]
    locks = [FileLock(place, thread_local=False) for place in places]
    number = _first_free(locks)
    try:
        yield number
    finally:
        locks[number].release()


def _first_free(locks: list[FileLock]) -> int:
    told = False
    while True:
        for number, lock in enumerate(locks):
            with suppress(Timeout):
                lock.acquire(timeout=0)
                return number
        if not told:
            logger.info("waiting for a device slot: %d of %d are taken", len(locks), len(locks))
            told = True
        raise_if_stopping("waiting for a device slot")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _shared_limit() -> Iterator[None]:
    """Hold a part of the server's limit. Whatever becomes of the server or the lease, the work goes on."""
    lease = _lease() if PREFECT_API_URL.value() else None
    try:
        yield
    finally:
        if lease:
            try:
                lease.__exit__(None, None, None)
            except Exception as error:
                logger.warning("the slot of %s could not be given back (%s); it expires by itself", LIMIT, error)


def _lease() -> AbstractContextManager[None] | None:
    run = TaskRunContext.get()
    holder = ConcurrencyLeaseHolder(type="task_run", id=run.task_run.id) if run else None
    told = False
    while True:
        raise_if_stopping(f"waiting for a slot of {LIMIT}")
        lease = concurrency(
            LIMIT,
            timeout_seconds=_ASK_SECONDS,
            lease_duration=LEASE_SECONDS,
            holder=holder,
            raise_on_lease_renewal_failure=False,
        )
        try:
            lease.__enter__()
            return lease
        except TimeoutError:
            if not told:
                logger.info("waiting for a slot of %s, which tasks on other machines hold", LIMIT)
                told = True
        except Exception as error:
            logger.warning("%s: Prefect cannot be asked (%s); this machine's slots alone count", LIMIT, error)
            return None
