"""What the tasks share: cache keys made from content, the retry rule, progress in the UI."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.tasks import exponential_backoff
from pydantic_core import to_jsonable_python

from lewis import store
from lewis.devices import default_device, precision
from lewis.errors import LewisError
from lewis.models.hub_errors import retryable
from lewis_tasks.support import records
from lewis_tasks.support.logs import quieten
from lewis_tasks.support.records import RecordSerializer

logger = logging.getLogger(__name__)
STOPPING = threading.Event()
"""Set on Ctrl-C. Long tasks run in threads, which cannot be interrupted: they end at their next report of progress."""
quieten()

RESULTS = records.RESULTS.folder
"""Folder of Prefect's cache records: small references, one file for each key."""
FORMAT = "2"  # of a record; raise it when records of before must not be found

# For errors that can pass by themselves: five tries in about a minute. A wrong input is not tried again.
RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": lambda task, run, state: retryable(_exception_of(state)),
}


def _exception_of(state: Any) -> BaseException:
    try:
        state.result()
    except BaseException as error:
        return error
    return RuntimeError("the task did not fail")


@dataclass
class ContentAddressed(CachePolicy):
    """A key of task name, version and SHA-256 of the chosen inputs; the same in every flow run and process.

    Attributes:
        fields, version, device_of: as for `cached`.
    """

    fields: tuple[str, ...] = ()
    version: str = "1"
    device_of: Callable[[], str] | None = None

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str:
        """The key, which is safe as a file name."""
        given = SimpleNamespace(**inputs)
        chosen = {field: to_jsonable_python(attrgetter(field)(given)) for field in self.fields}
        version = f"{self.version}-{self.device_of()}" if self.device_of else self.version
        key = f"{task_ctx.task.name}-v{version}-{store.digest([FORMAT, chosen])[:40]}"
        store.mark_used(RESULTS / key)
        return key


def computing_in() -> str:
    """The number format in which forward passes on this machine compute."""
    return precision(default_device())


def cached(*fields: str, version: str = "1", device_of: Callable[[], str] | None = None) -> dict[str, Any]:
    """Arguments of `@task` for a result that Prefect finds again by the content of the inputs.

    Args:
        fields: the task's arguments that decide the result, or `argument.attribute`.
        version: to be changed when the same inputs give another result.
        device_of: if the numbers depend on the device, gives what they depend on. It is called on the machine that runs
            the task, because the machine of the flow may have no GPU.

    A result is a small reference, which checks its files when it is loaded. If they are deleted or damaged, or the
    reference itself is, it cannot be loaded, and the task runs again. If two runs enter a task at once, the store's
    lock lets one of them compute.
    """
    return {
        "cache_policy": ContentAddressed(fields=fields, version=version, device_of=device_of),
        "persist_result": True,
        "result_storage": RESULTS,
        "result_serializer": RecordSerializer(),
        "cache_result_in_memory": False,
    }


def raise_if_stopping(what: str) -> None:
    """End a task if the process was told to stop.

    Raises:
        LewisError: if it was; the message begins with `what`.
    """
    if STOPPING.is_set():
        raise LewisError(f"{what}: stopped")


class Progress:
    """Progress of a long task: an artifact in the UI and a line in the log, every two seconds."""

    def __init__(self, kind: str, what: str) -> None:
        self._kind, self._what, self._last = kind, what, time.monotonic()
        self._artifact: UUID | None = None

    def __call__(self, fraction: float) -> None:
        """Report a fraction in [0, 1].

        Raises:
            LewisError: if the process was told to stop.
        """
        raise_if_stopping(self._what)
        if time.monotonic() - self._last < 2 and (fraction < 1 or self._artifact is None):
            return
        self._last = time.monotonic()
        percent = round(100 * fraction, 1)
        if self._artifact is None:
            key = f"{self._kind}-progress"
            made = create_progress_artifact(progress=percent, key=key, description=self._what)
            assert isinstance(made, UUID)  # not awaitable, as there is no event loop here
            self._artifact = made
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)
        logger.info("%s: %.0f %%", self._what, percent)


def slug(text: str) -> str:
    """A text in small letters, digits and dashes, of which the keys of artifacts must consist."""
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).split("-")
    return "-".join(word for word in words if word) or "x"
