"""Device slots limit the tasks that use torch at the same time, on one machine or all that share a Prefect server."""

import contextvars
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import httpx
from filelock import FileLock, Timeout
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_API_URL

from lewis import settings
from lewis.devices import devices
from lewis.errors import InputError
from lewis_tasks.support import device_queue
from lewis_tasks.support.caching import raise_if_stopping
from lewis_tasks.support.device_queue import Note
from lewis_tasks.support.events import Wait

logger = logging.getLogger(__name__)
LIMIT = "lewis-device"
"""Name of Prefect's global limit over all machines; without it, only the slots of each machine limit the tasks."""
LEASE_SECONDS = 60.0  # the minimum in Prefect; so long a killed holder keeps its part of the limit
_POLL_SECONDS = 0.1
_ASK_SECONDS = 1.0


def slots() -> int:
    """Return the number of device slots of this machine: `LEWIS_DEVICE_SLOTS`, by default one per GPU, or 1 without.

    Raises:
        InputError: if the variable is no whole number from 1 up.
    """
    return settings.DEVICE_SLOTS.get() or len(devices())


@contextmanager
def device_slot(*, gives_way: bool = False, gpus: int = 1) -> Iterator[str]:
    """Hold device slots of this machine while torch works; yield the devices' names, such as `cpu` or `cuda:0,cuda:1`.

    A slot is a kernel lock, which is free as soon as its holder dies. If the Prefect server has the limit
    `lewis-device`, a part of it is held too, which is free when the lease of a killed holder ends. `device_queue` shows
    which tasks hold slots or wait for them.

    Args:
        gives_way: take no slot while a task of this machine waits that does not give way: merges go before searches.
        gpus: how many GPUs are needed at the same time.

    Raises:
        InputError: if this machine has fewer GPUs, or the server's limit is smaller.
        LewisError: if the process got the signal to stop while it waited.
    """
    usable = list(dict.fromkeys(_names()))
    if gpus > len(usable) or (gpus > 1 and usable == ["cpu"]):
        has = "no GPU" if usable == ["cpu"] else f"{len(usable)} of them for tasks"
        raise InputError(f"evaluate.gpus: {gpus} GPUs are needed at once, but this machine has {has}; lower it")
    with (
        device_queue.queued(gives_way=gives_way) as note,
        _machine_slots(note, gpus) as held,
        _shared_limit(note, gpus),
    ):
        note.hold()
        yield ",".join(held)


def _names() -> list[str]:
    """The device of each slot of this machine."""
    names = devices()
    return [names[number % len(names)] for number in range(slots())]


@contextmanager
def _machine_slots(note: Note, gpus: int) -> Iterator[list[str]]:
    """Hold slots of `gpus` devices; one task at a time collects several, so that no two tasks wait for each other."""
    place = f"lewis-device-{os.getuid()}"
    with ExitStack() as held:
        if gpus > 1:
            several = _lock(f"{place}-several.lock")
            _first_free([several], note)
            held.callback(several.release)
        free = {_lock(f"{place}-{number}.lock"): name for number, name in enumerate(_names())}
        found = list[str]()
        while len(found) < gpus:
            lock = _first_free([lock for lock, name in free.items() if name not in found], note)
            held.callback(lock.release)
            found.append(free[lock])
        yield sorted(found)


def _lock(name: str) -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / name, thread_local=False)


def _first_free(locks: Iterable[FileLock], note: Note) -> FileLock:
    wait = Wait()
    while True:
        if not (note.place.gives_way and device_queue.somebody_waits()):
            for lock in locks:
                with suppress(Timeout):
                    lock.acquire(timeout=0)
                    return lock
        held = [place for place in device_queue.queue() if place.holds]
        who = ", ".join(f"which {each.what} holds since {each.since.astimezone():%H:%M}" for each in held)
        wait.look(note.place.what, f"a device slot, {who or 'all taken'}")
        raise_if_stopping("waiting for a device slot")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _shared_limit(note: Note, gpus: int) -> Iterator[None]:
    """Hold `gpus` slots of the server's limit; the work goes on even if the server or the lease is lost.

    Prefect's `concurrency` is not used: it waits without end if its first request fails, and warns if no limit exists.
    """
    with ExitStack() as held:
        if PREFECT_API_URL.value():
            try:
                client = held.enter_context(get_client(sync_client=True))
                lease = _acquire(client, note, gpus)
                if lease:
                    held.callback(_release, client, lease)
                    held.callback(_keep(client, lease))
            except httpx.HTTPError as error:
                logger.warning("%s: Prefect does not answer (%s): this machine's slots alone count", LIMIT, error)
        yield


def _acquire(client: SyncPrefectClient, note: Note, gpus: int) -> UUID | None:
    """Wait for `gpus` slots of the server's limit; return the id of their lease, None if there is no such limit."""
    run = TaskRunContext.get()
    holder = ConcurrencyLeaseHolder(type="task_run", id=run.task_run.id) if run else None
    wait = Wait()
    while True:
        raise_if_stopping(f"waiting for a slot of {LIMIT}")
        try:
            answer = client.increment_concurrency_slots_with_lease([LIMIT], gpus, "concurrency", LEASE_SECONDS, holder)
        except httpx.HTTPStatusError as error:
            smaller = error.response.status_code == httpx.codes.UNPROCESSABLE_ENTITY
            if smaller and gpus > 1:
                raise InputError(
                    f"evaluate.gpus: {gpus} GPUs are needed at once, but Prefect's limit {LIMIT} over all machines is "
                    f"smaller; raise it: prefect gcl update {LIMIT} --limit N"
                ) from error
            if not smaller and error.response.status_code != httpx.codes.LOCKED:
                raise
            why = "whose limit is 0" if smaller else "which other tasks hold"
            wait.look(note.place.what, f"a slot of {LIMIT}, {why}")
            time.sleep(_ASK_SECONDS)
        else:
            found = answer.json()
            return UUID(found["lease_id"]) if found["limits"] else None


def _keep(client: SyncPrefectClient, lease: UUID) -> Callable[[], None]:
    """Start a thread that renews a lease of the server's limit; return the function that ends the thread."""
    ended = threading.Event()

    def renew() -> None:
        told = False
        while not ended.wait(LEASE_SECONDS / 4):
            try:
                client.renew_concurrency_lease(lease, LEASE_SECONDS)
            except Exception as error:
                if not told and not ended.is_set():
                    logger.warning("%s: the lease is not renewed (%s); the work goes on", LIMIT, error)
                told = True

    def end() -> None:
        ended.set()
        keeper.join(5)

    keeper = threading.Thread(target=contextvars.copy_context().run, args=[renew], name=f"{LIMIT}-lease", daemon=True)
    keeper.start()
    return end


def _release(client: SyncPrefectClient, lease: UUID) -> None:
    try:
        client.release_concurrency_slots_with_lease(lease)
    except httpx.HTTPError as error:
        logger.warning("%s: the slot is not given back (%s); it expires in a minute", LIMIT, error)
