"""The log of a run: our own messages, and the message of a failure without what Prefect adds to it."""

import logging

from lewis.errors import LewisError
from lewis.redact import redact_logs
from lewis.store.writable import of_the_disk


def quieten() -> None:
    """Let lewis and lewis_tasks log at INFO, and remove noise and passwords from what is logged."""
    redact_logs()
    for library in ("lewis", "lewis_tasks"):
        logging.getLogger(library).setLevel(logging.INFO)
    for runs in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(runs).addFilter(worth_reading)
    logging.getLogger("mlflow.store.db.utils").addFilter(without_traceback)  # the error goes on, and we tell it


def worth_reading(record: logging.LogRecord) -> bool:
    """Filter of log records: False drops the record.

    Of a LewisError the traceback is dropped, because the message says what went wrong; that of a full disk, too.
    Records of tasks that did not start because another failed are dropped; the UI shows those tasks. Dropped too is
    Prefect's warning that a timeout stops a thread only between calls: our threads loop over tensors and batches, and
    lm-eval runs in a child process.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, LewisError) or of_the_disk(error):
        without_traceback(record)
    message = record.getMessage()
    return not message.startswith(("Finished in state NotReady", "Timeout of "))


def without_traceback(record: logging.LogRecord) -> bool:
    """Filter of log records: drops the traceback, and keeps the record."""
    record.exc_info = record.exc_text = None
    return True
