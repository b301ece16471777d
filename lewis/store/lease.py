"""Locks that hold across machines which share no disk: leases, small objects of the remote half (`LEWIS_STORE`).

A lease is an object that is made only if there is none of its name, which object stores and disks do atomically
(`remote.create`). The library needs nothing else that way. Prefect's global concurrency limits have leases too, but the
library works without a Prefect server, a limit would have to be made for every entry, and a server that restarts
would free none of them earlier.

The objects of one lock are numbered: `leases/<lock>/<number>`. The highest is the holder's, who writes a new end into
it every `SECONDS / 4`, and an end that has passed when it gives the lease back. Then, or when a holder is killed and
its end passes, the next holder makes the object of the next number, which only one can, and removes the one before.
The numbers never go back, so a slow process that makes an object which was made and removed before sees a higher
one.

The end is by the holder's clock; if that is set back meanwhile, by the time that has passed since it took the lease. An
object that has not changed for `SECONDS + GRACE` by the clock of a waiting process has ended, too, so that a killed
holder whose clock was ahead blocks nobody. If clocks differ by more than `GRACE`, or a holder stands still for longer,
two may hold one lease. Whatever is made under it is addressed by content and published whole, so that costs double
work. The local lock, which is held as well, is exact.
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
SECONDS = 60.0  # for so long a lease lives after its holder was last heard of
GRACE = 15.0  # seconds by which clocks of two machines may differ
_POLL, _LOOKS = 1.0, 5
_seen: dict[str, tuple[tuple[int, float], float]] = {}  # lease -> number and end, and since when, as time.monotonic()


class Lease:
    """A lock of the remote half, as far as there is one: else, or while it does not answer, everybody may hold it."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: the same on every machine.
        """
        self._name, self._folder = name, f"leases/{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        self._own = ""
        self._zero = 0.0  # of the monotonic clock, by the clock when the lease was taken
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None

    def acquire(self, timeout: float = -1) -> ExitStack:
        """Take it, and renew it in a thread until `release`.

        Args:
            timeout: seconds to wait; below 0, for ever.

        Returns:
            What gives it back at the end of a block.

        Raises:
            Timeout: if another holder has it for longer.
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
        """Give it back, if it is held."""
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
        own, data = f"{number + 1:08d}", self._content()
        try:
            remote.create(system, f"{place}/{own}", data)
        except (PermissionError, NotImplementedError, TypeError, ValueError):  # it can never be created here
            raise
        except Exception:  # it exists, which each file system says in its way; or the answer was lost, and it is ours
            pass
        if self._highest(system, place)[0] != number + 1:
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
        """Whether its newest object has been the same for as long as a lease lives without its holder."""
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
        """Number and end (Unix time, seconds) of the newest object; 0 and 0.0 if there is none.

        Raises:
            OSError: if the newest that is listed is never there.
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
            name: the same on every machine.
            local: name of the lock of this machine, if that is another; paths may differ between machines.
        """
        self._local, self._lease = files.lock(local or name), Lease(name)

    def acquire(self, timeout: float = -1) -> ExitStack:
        """Take both, waiting at most so many seconds for each; below 0, for ever.

        Returns:
            What gives them back at the end of a block.

        Raises:
            Timeout: if one is held for longer.
        """
        with ExitStack() as held:
            held.enter_context(self._local.acquire(timeout=timeout))
            held.enter_context(self._lease.acquire(timeout))
            return held.pop_all()

    def release(self) -> None:
        """Give back what is held."""
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
    """`kind.lock`, and with `LEWIS_STORE` a lease, while one looks for an entry that is shared, and makes it.

    An entry that another machine has made meanwhile is fetched. No lease is taken for one that is there already.
    """
    path = kind.path(digest)
    with kind.lock(digest):
        absent = remote.shares(path) and not path.exists() and not remote.fetch(path)
        with Lease(kind.locks + digest).acquire() if absent else nullcontext():
            yield
