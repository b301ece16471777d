"""Give tasks the results of other tasks, and wait for them."""

from collections.abc import Iterable
from typing import Any, TypeVar

from prefect import Task
from prefect.futures import PrefectFuture, wait
from prefect.utilities.annotations import quote

from lewis_tasks.support.failures import result_of

R = TypeVar("R")


def submit(
    task: Task[..., R], *arguments: Any, wait_for: Iterable[PrefectFuture[Any]] | None = None
) -> PrefectFuture[R]:
    """Start a task as soon as its arguments are there.

    It is `Task.submit`, whose own types allow only an argument's value.

    Args:
        task: what to start.
        arguments: for each argument its value, a future of it, or the value quoted; Prefect searches a value for
            results of other tasks, but not a quoted one.
        wait_for: what must have ended before.
    """
    return task.submit(*arguments, wait_for=wait_for, return_state=False)


def known(futures: Any) -> quote:
    """The results of finished tasks, quoted, so that Prefect draws no edges from those tasks to their reader.

    For readers that only write down what is known. Their edges would say nothing, and they are many: Prefect's server
    sends each edge as many times as the task it comes from has inputs, and its UI draws no edge at all if it counts
    more than 500.

    Args:
        futures: a future, None, or a list or dictionary of futures.
    """
    if isinstance(futures, dict):
        return quote({name: future.result() for name, future in futures.items()})
    if isinstance(futures, list):
        return quote([future.result() for future in futures])
    return quote(futures.result() if futures else None)


def finish(*futures: PrefectFuture[Any] | None) -> None:
    """Wait for all tasks.

    Raises:
        LewisError: what the first failed task in this order raised; so give a cause before what it breaks.
    """
    given = [future for future in futures if future is not None]
    wait(given)
    for future in given:
        result_of(future)
