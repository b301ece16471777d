"""Start a Prefect worker with the settings of `lewis up`'s worker: no telemetry, quick polls, its format of logs.

    PREFECT_API_URL=http://127.0.0.1:4200/api python -m lewis_flows.service.worker --limit 4

The process becomes `prefect worker start --pool lewis --type process`, followed by its own arguments. A `--pool` among
these replaces the one of this command.
"""

import os
import socket
import sys
from collections.abc import Sequence

from lewis import settings
from lewis.errors import InputError
from lewis.evaluation import work_queue
from lewis.store.secrets import METRICS_KEY, MLFLOW_PASSWORD, PREFECT_KEY, WEBHOOK_SECRET
from lewis_flows import environment
from lewis_flows.service import credentials

NOT_FOR_RUNS = (
    *(each.variable.name for each in (PREFECT_KEY, MLFLOW_PASSWORD, WEBHOOK_SECRET, METRICS_KEY)),
    *("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_PASSWORD"),
    *("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_PASSWORD"),
    *("MLFLOW_BACKEND_STORE_URI", "MLFLOW_FLASK_SERVER_SECRET_KEY", settings.NOTIFY_URL.name),
)
"""Variables with secrets of servers and of the receiver. A worker drops them, since runs inherit its environment."""


def command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with which Python starts a Prefect worker; `arguments` are the worker's own."""
    named = any(each.partition("=")[0] in ("--pool", "-p") for each in arguments)  # Prefect takes it only once
    pool = [] if named else ["--pool", work_queue.MERGES]
    return ["-m", "prefect", "worker", "start", *pool, "--type", "process", *arguments]


def name_of_up() -> str:
    """Return the name that the worker of `lewis up` on this machine has on Prefect's server."""
    return f"lewis-{socket.gethostname()}"


def check_clock() -> None:
    """Check that the clocks of this machine and of Prefect's server agree, if the server answers.

    Raises:
        InputError: if they differ by more than half of `DEAD_AFTER`, so that the server may take a living run for dead.
    """
    import httpx

    from lewis_flows.service.prefect_app import DEAD_AFTER
    from lewis_tasks.support.events import ahead_by

    try:
        found = ahead_by(httpx.get(f"{os.environ.get('PREFECT_API_URL', '')}/health", timeout=10).headers)
    except (httpx.HTTPError, httpx.InvalidURL):  # Prefect's worker says what is wrong
        return
    if abs(found) > DEAD_AFTER / 2:
        side = "behind" if found.total_seconds() > 0 else "ahead of"
        raise InputError(
            f"the clock of this machine is {abs(found).total_seconds():.0f} s {side} that of Prefect's server, which "
            "would take runs for dead; set both by NTP (timedatectl set-ntp true)"
        )


def main() -> int:
    """Become the worker; the exit code is 2 if a setting or the clock is wrong."""
    try:
        environment.prepare()
        credentials.find()
        check_clock()
    except InputError as error:
        print(f"lewis: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for name in NOT_FOR_RUNS:
        os.environ.pop(name, None)
    os.execv(sys.executable, [sys.executable, *command(sys.argv[1:])])


if __name__ == "__main__":
    sys.exit(main())
