"""What a person reads of a run: our own lines, and of a failure its message, without what Prefect adds around it."""

import logging

from lewis.errors import LewisError


def quieten() -> None:
    """Let lewis and lewis_tasks log at INFO, and take noise out of Prefect's run logs."""
    for library in ("lewis", "lewis_tasks"):
        logging.getLogger(library).setLevel(logging.INFO)
    for runs in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(runs).addFilter(worth_reading)


def worth_reading(record: logging.LogRecord) -> bool:
    """Filter of log records.

    An error of ours says what went wrong in its message: its traceback is dropped. Tasks that did not start because of
    it are dropped too; the UI shows them. So is Prefect's warning, at the start of each task with a timeout, that a
    thread is only stopped between calls: the work is loops over tensors and batches, and lm-eval has a child process.
    """
    if record.exc_info and isinstance(record.exc_info[1], LewisError):
        record.exc_info = record.exc_text = None
    message = record.getMessage()
    return not message.startswith(("Finished in state NotReady", "Timeout of "))
