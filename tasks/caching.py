"""What the tasks share: cache keys by content, the retry rule, the device slot, progress in the UI."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import CachePolicy
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.tasks import exponential_backoff
from pydantic_core import to_jsonable_python

from lewis import hub, store
from lewis.device import default_device

logger = logging.getLogger(__name__)
for _library in ("lewis", "tasks"):
    logging.getLogger(_library).setLevel(logging.INFO)
# Prefect warns at the start of every task with a timeout that a thread is stopped between calls only. That is what we
# want: the work is loops over tensors and batches, and lm-eval, the one long call, has a child process to kill.
logging.getLogger("prefect.task_runs").addFilter(lambda record: not str(record.msg).startswith("Timeout of %s seconds"))
DEVICE_SLOT = "lewis-device"

# For what can heal by itself: five tries in about a minute, never for a wrong input.
RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": lambda task, run, state: hub.retryable(_exception_of(state)),
}


def _exception_of(state: Any) -> BaseException:
    try:
        state.result()
    except BaseException as error:
        return error
    return RuntimeError("the task did not fail")


@dataclass
class ContentAddressed(CachePolicy):
    """Key = task name, version, SHA-256 of the chosen inputs: the same in every flow run, process and deployment."""

    fields: tuple[str, ...] = ()
    version: str = "1"

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str:
        """The key, of characters that are safe in a file name."""
        chosen = {field: to_jsonable_python(inputs[field]) for field in self.fields}
        return f"{task_ctx.task.name}-v{self.version}-{store.digest(chosen)[:40]}"


def cached(*fields: str, version: str = "1") -> dict[str, Any]:
    """Arguments of `@task` for a result that is kept in the store by content.

    A result is a small reference that checks the disk when it is loaded: one to deleted or truncated files cannot be
    loaded, so the task runs again. Two runs at once both enter the task, and the store's lock lets one compute.
    """
    return {
        "cache_policy": ContentAddressed(fields=fields, version=version),
        "persist_result": True,
        "result_storage": store.home() / "results",
        "result_serializer": "json",
        "cache_result_in_memory": False,
    }


def create_device_slot() -> None:
    """Make sure that the slot exists: without it a limit would silently be no limit."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(DEVICE_SLOT, 1)


@contextmanager
def device_slot() -> Iterator[str]:
    """Hold the one device while torch works on it; gives its name. A dead holder's slot is free after a minute."""
    with concurrency(DEVICE_SLOT, occupy=1, strict=True, lease_duration=60):
        yield default_device()


class Progress:
    """Progress of a long task: an artifact in the UI, a line in the log, at most every two seconds."""

    def __init__(self, kind: str, what: str) -> None:
        self._kind, self._what, self._artifact, self._last = kind, what, None, 0.0

    def __call__(self, fraction: float) -> None:
        """Report a fraction in [0, 1]."""
        if fraction < 1 and time.monotonic() - self._last < 2:
            return
        self._last = time.monotonic()
        percent = round(100 * fraction, 1)
        if self._artifact is None:
            self._artifact = create_progress_artifact(
                progress=percent, key=f"{self._kind}-progress", description=self._what
            )
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)
        logger.info("%s: %.0f %%", self._what, percent)


def slug(text: str) -> str:
    """Letters, digits and dashes only, as artifact keys must be."""
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).split("-")
    return "-".join(word for word in words if word) or "x"
