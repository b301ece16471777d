"""Locks between machines that share no disk: leases, which are small objects in the remote half (`LEWIS_STORE`).

A lease is an object that is created only if no object has its name, which object stores and disks do atomically
(`remote.create`); the library needs no other service for it. Prefect's global concurrency limits have leases too, but
the library works without a Prefect server, a limit would have to be made for every entry, and a server that restarts
would free none of them earlier.

The objects of one lock are numbered: `leases/<lock>/<number>`. The highest is that of the holder, which writes a new
end time into it every `SECONDS / 4`, and a past end time to release the lease. Once the end time has passed, also
because the holder was killed, the next holder creates the object of the next number, which only one process can, and
removes the one before. The numbers never decrease, so a slow process that creates an object which was created and
removed before sees a higher one.

The end time is by the holder's clock; if that is set back meanwhile, by the time that has passed since it took the
lease. A lease has also ended if its object has not changed for `SECONDS + GRACE` by the clock of a waiting process, so
that a killed holder whose clock was ahead blocks nobody. If clocks differ by more than `GRACE`, or a holder is
suspended for longer, two processes may hold one lease. Entries are addressed by content and published whole, so this
only costs double work. The local lock, which is held as well, never has two holders.
"""

import contextvars
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, Self

from filelock import Timeout

from lewis.redact import redacted
from lewis.store import files, remote
from lewis.store.kinds import Kind
from lewis.store.scratch import writer

logger = logging.getLogger(__name__)
SECONDS = 60.0  # from the last renewal of a lease to its end
GRACE = 15.0  # seconds by which clocks of two machines may differ
_POLL, _LOOKS = 1.0, 5  # seconds between two attempts to take a lease; how often a listed object is looked for
_seen: dict[str, tuple[tuple[int, float], float]] = {}  # lease -> number and end, and time.monotonic() of the change


class Lease:
    """A lock in the remote half of the store; without one, or while it does not answer, every process gets the lock."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: name of the lock, the same on every machine.
        """
        self._name, self._folder = name, f"leases/{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        self._own = ""
        self._zero = 0.0  # Unix time at 0 of the monotonic clock, as it was when the lease was taken
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None

    def acquire(self, timeout: float = -1) -> ExitStack:
        """Take the lease, and renew it in a thread until `release`.

        Args:
            timeout: seconds to wait; below 0, without limit.

        Returns:
            A context manager that releases the lease at the end of its block.

        Raises:
            Timeout: if another process holds the lease for longer.
        """
        begin, logged = time.monotonic(), False
        while remote.url():
            try:
                if self._try():
                    break
            except Exception as error:  # each file system has errors of its own
                text = redacted(f"{type(error).__name__}: {error}")
                logger.warning("LEWIS_STORE: no lease of %s, the work goes on without: %s", self._name, text)
                break
            if 0 <= timeout <= time.monotonic() - begin:
                raise Timeout(self._name)
            if not logged:
                logger.info("waiting for %s, which another machine holds", self._name)
                logged = True
            time.sleep(_POLL if timeout < 0 else min(_POLL, timeout))
        held = ExitStack()
        held.callback(self.release)
        return held

    def release(self) -> None:
        """Release the lease, if this object holds it."""
        self._ended.set()
        if self._own and self._keeper:
            self._keeper.join(10)  # else the thread could write the object again
            with suppress(Exception):  # the lease ends by itself
                system, place = self._opened()
                if self._highest(system, place)[0] == int(self._own):
                    system.pipe_file(f"{place}/{self._own}", self._content(0.0))
            self._own = ""

    def _try(self) -> bool:
        system, place = self._opened()
        number, end = self._highest(system, place)
        if end > time.time() - GRACE and not self._stands_still(number, end):
            return False
        self._zero = time.time() - time.monotonic()
        own, data, failure = f"{number + 1:08d}", self._content(), None
        try:
            remote.create(system, f"{place}/{own}", data)
        except Exception as error:  # if it exists, by an error of each file system's own; or the answer was lost
            failure = error
        highest = self._highest(system, place)[0]
        if failure and highest <= number:  # nobody created it: the remote half takes no writes
            raise failure
        if highest != number + 1:
            with suppress(FileNotFoundError):
                if system.cat_file(f"{place}/{own}") == data:
                    system.rm_file(f"{place}/{own}")
            return False
        try:
            ours = system.cat_file(f"{place}/{own}") == data
        except FileNotFoundError:  # another made it, and the next holder removed it
            ours = False
        if not ours:
            return False
        if number:
            with suppress(FileNotFoundError):
                system.rm_file(f"{place}/{number:08d}")
        self._own = own
        self._ended = threading.Event()
        renew = contextvars.copy_context().run
        self._keeper = threading.Thread(
            target=renew, args=[self._renew, own, self._ended], name="lewis-lease", daemon=True
        )
        self._keeper.start()
        return True

    def _stands_still(self, number: int, end: float) -> bool:
        """Whether the lease's newest object has not changed for longer than a lease outlives a killed holder."""
        before, since = _seen.get(self._name, (None, 0.0))
        if before != (number, end):
            _seen[self._name] = (number, end), time.monotonic()
            return False
        return time.monotonic() - since > SECONDS + GRACE

    def _renew(self, own: str, ended: threading.Event) -> None:
        while not ended.wait(SECONDS / 4):
            try:
                system, place = self._opened()
                if self._highest(system, place)[0] > int(own):
                    logger.warning("the lease of %s was taken over; the work goes on", self._name)
                    return
                if not ended.is_set():
                    system.pipe_file(f"{place}/{own}", self._content())
            except Exception as error:
                text = redacted(f"{type(error).__name__}: {error}")
                logger.warning("the lease of %s is not renewed (%s); the work goes on", self._name, text)

    def _opened(self) -> tuple[Any, str]:
        system, root = remote.opened()
        return system, f"{root}/{self._folder}"

    def _content(self, end: float | None = None) -> bytes:
        end = max(time.time(), self._zero + time.monotonic()) + SECONDS if end is None else end
        return json.dumps({"holder": writer(), "lock": id(self), "end": end}).encode()

    @staticmethod
    def _highest(system: Any, place: str) -> tuple[int, float]:
        """Return number and end (Unix time, seconds) of a lease's newest object; 0 and 0.0 if there is no object.

        Raises:
            OSError: if the newest object in the listing is never found.
        """
        for _ in range(_LOOKS):
            try:
                numbers = [name.rpartition("/")[2] for name in system.ls(place, detail=False)]
            except FileNotFoundError:
                return 0, 0.0
            number = max((int(each) for each in numbers if each.isdecimal()), default=0)
            if not number:
                return 0, 0.0
            newest = f"{place}/{number:08d}"
            with suppress(FileNotFoundError):  # a newer object has replaced it
                try:
                    return number, float(json.loads(system.cat_file(newest))["end"])
                except (ValueError, KeyError, TypeError):  # on a disk: it is being written, or its writer was killed
                    return number, system.modified(newest).timestamp() + SECONDS
            time.sleep(_POLL / _LOOKS)
        raise OSError(f"{newest} is listed, and not there")


class SharedLock:
    """A lock between processes and threads of this machine, and with `LEWIS_STORE` between machines."""

    def __init__(self, name: str, local: str = "") -> None:
        """
        Args:
            name: name of the lock, the same on every machine.
            local: name of this machine's lock, if it differs, since paths may differ between machines.
        """
        self._local, self._lease = files.lock(local or name), Lease(name)

    def acquire(self, timeout: float = -1) -> ExitStack:
        """Take the local lock and the lease; wait at most `timeout` seconds for each, below 0 without limit.

        Returns:
            A context manager that releases both at the end of its block.

        Raises:
            Timeout: if another process holds one of them for longer.
        """
        with ExitStack() as held:
            held.enter_context(self._local.acquire(timeout=timeout))
            held.enter_context(self._lease.acquire(timeout))
            return held.pop_all()

    def release(self) -> None:
        """Release the local lock and the lease, if they are held."""
        if self._local.is_locked:
            self._lease.release()
            self._local.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


@contextmanager
def turn(kind: Kind, digest: str) -> Iterator[None]:
    """Hold `kind.lock`, and a lease if `LEWIS_STORE` shares the kind, for a block that finds an entry or makes it.

    No lease is taken if the entry exists, or is fetched because another machine has made it.
    """
    path = kind.path(digest)
    with kind.lock(digest):
        absent = remote.shares(path) and not path.exists() and not remote.fetch(path)
        with Lease(kind.locks + digest).acquire() if absent else nullcontext():
            yield
