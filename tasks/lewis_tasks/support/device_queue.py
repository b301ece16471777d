"""The queue for this machine's device slots: a note for each task that holds or awaits one, in a folder of this user.

A note is locked by its writer. The kernel frees the lock when the writer dies, so a note that can be locked is stale.
"""

import fcntl
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext, TaskRunContext
from pydantic import BaseModel, ValidationError

from lewis import store
from lewis.errors import InputError

logger = logging.getLogger(__name__)


class Place(BaseModel):
    """A task that holds a slot or waits for one.

    Attributes:
        what: run and task, as Prefect names them.
        holds: whether it holds a slot.
        gives_way: whether it lets others go first, as the trials of a search do.
        since: since when it holds, or waits, UTC.
    """

    what: str
    holds: bool = False
    gives_way: bool = False
    since: datetime


class Note:
    """The note of this task's place in the queue, for other processes to read; without a file, it is invisible to them.

    Attributes:
        place: what the note says now.
    """

    def __init__(self, place: Place, file: int | None) -> None:
        """Write the note into a file that is open and locked, if there is one."""
        self.place, self._file = place, file
        self._write()

    def hold(self) -> None:
        """Note that the task holds a slot from now on."""
        self.place = self.place.model_copy(update={"holds": True, "since": datetime.now(UTC)})
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        data = self.place.model_dump_json().encode()
        with suppress(OSError):  # the disk is full: the task works unseen
            os.pwrite(self._file, data.ljust(4096), 0)  # one write: a reader sees it whole


@contextmanager
def queued(*, gives_way: bool = False) -> Iterator[Note]:
    """Keep a note of this task in the queue while the block lasts: as waiting, and as holding once `hold` is called."""
    place = Place(what=_what(), gives_way=gives_way, since=datetime.now(UTC))
    try:
        path = store.private_folder(_folder()) / f"{uuid.uuid4().hex}.json"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, InputError) as error:
        logger.warning("nobody sees that this task waits for a device: %s", error)
        yield Note(place, None)
        return
    try:
        yield Note(place, file)
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def queue() -> list[Place]:
    """Return the tasks that hold a slot of this machine, then those that wait for one, each oldest first."""
    found = [place for path in _folder().glob("*.json") if (place := _read(path))]
    return sorted(found, key=lambda place: (not place.holds, place.since))


def somebody_waits() -> bool:
    """Whether a task waits for a slot of this machine that does not give way to others itself."""
    return any(not place.holds and not place.gives_way for place in queue())


def _read(path: Path) -> Place | None:
    with suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(ValueError, ValidationError):  # it is being written
                return Place.model_validate(json.loads(file.read()))
            return None
        if time.time() - path.stat().st_mtime > 1:  # its writer died: a live one has its lock within a second
            path.unlink(missing_ok=True)
    return None


def _what() -> str:
    run, task = FlowRunContext.get(), TaskRunContext.get()
    names: list[Any] = [run.flow_run.name if run and run.flow_run else None, task.task_run.name if task else None]
    return ": ".join(str(name) for name in names if name) or f"process {os.getpid()}"


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"lewis-device-{os.getuid()}"
