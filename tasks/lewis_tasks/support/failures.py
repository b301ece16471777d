"""What a person reads about a failed run: which task failed, why, and what to do; no traceback."""

import functools
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.states import Failed, State

from lewis.errors import BrokenModelError, InputError, LewisError, TransientError
from lewis.redact import redacted
from lewis.store.writable import explained, of_the_disk
from lewis_tasks.support.flow_run import BROKEN, tag

P = ParamSpec("P")
R = TypeVar("R")
PATIENCE = 10.0  # seconds; the server learns of task runs and their names from events, which arrive a little late
MAX_MESSAGE = 2000  # characters
AUTOMATIC = re.compile(r"-[0-9a-f]{3}$")  # what Prefect appends to the name of a task
DETAILS = "\nThe end of its output:"  # what follows is output of lm-eval, for the log
AGAIN = "what was finished is kept, run it again to go on"


class NotPublishedError(LewisError):
    """Raised if a version was registered, and promoted if the gate allowed it, but could not be published."""


def says_why(function: Callable[P, R | State[R]]) -> Callable[P, R]:
    """Make a flow function end in a Failed state with the message of its LewisError; the caller still gets the error.

    The state's name is `Failed`, or `Unpublished`. A broken commit becomes a tag of the run.
    If the function raised the error, Prefect would put its own words and the name of the class around the message.
    The result is typed as what the flow's caller gets: Prefect takes it out of the state.
    """

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return function(*args, **kwargs)
        except LewisError as error:
            if isinstance(error, BrokenModelError):
                tag(**{BROKEN: error.commit})
            name = "Unpublished" if isinstance(error, NotPublishedError) else "Failed"
            return Failed(name=name, message=str(error).partition(DETAILS)[0][:MAX_MESSAGE], data=error)

    return told


def result_of(future: PrefectFuture[Any]) -> Any:
    """Return the result of a finished task.

    Raises:
        BrokenModelError, InputError, TransientError, LewisError: as the task raised it, with the name of its run
            before the message; a LewisError for any other exception.
    """
    try:
        return future.result()
    except Exception as error:
        kind = next((k for k in (InputError, TransientError) if isinstance(error, k)), LewisError)
        traceback = "" if of_the_disk(error) else "the traceback is in the task's log; "
        lines = (explained(error) if isinstance(error, OSError) else str(error)).strip().splitlines()
        first = redacted(f"{type(error).__name__}: {lines[0]}") if lines else type(error).__name__
        message = str(error) if isinstance(error, LewisError) else f"{first}; {traceback}{AGAIN}"
        message = f"{_name(future)}: {message}"
        if isinstance(error, BrokenModelError):
            raise BrokenModelError(message, error.commit) from error
        raise kind(message) from error


def _name(future: PrefectFuture[Any]) -> str:
    """Return the name of a task run; wait up to `PATIENCE` for its final name, which it gets when it ends."""
    name, deadline = "a task", time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(Exception), get_client(sync_client=True) as client:  # report the error even without the name
            run = client.read_task_run(future.task_run_id)
            name = AUTOMATIC.sub("", run.name)
            if run.state and run.state.is_final():
                return name
        time.sleep(0.2)
    return name
