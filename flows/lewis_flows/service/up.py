"""`lewis up`: the whole service in the foreground, on loopback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from filelock import Timeout

from lewis import settings, store
from lewis.errors import InputError, LewisError
from lewis.evaluation import work_queue
from lewis.registry import tracking
from lewis.serving import slots
from lewis.store.secrets import PREFECT_KEY
from lewis_flows.service import credentials, note, worker
from lewis_flows.service.processes import Process, usable_port
from lewis_flows.service.servers import (
    ONE_HEAP,
    mlflow_database,
    mlflow_process,
    prefect_database,
    prefect_port,
    prefect_process,
)

Say = Callable[[str, str], None]  # called with the name of a part and a line of its output
_NOISE = (
    *(" ___ ___ ", "| _ \\ _ \\", "|  _/ ", "|_| |_|_"),  # Prefect's name in letters
    "already in terminal state",  # if a run ends while its heartbeat is on the way
    "This feature is still experimental",  # MLflow's basic authentication, whenever it starts
    *("StarletteDeprecationWarning", "import WSGIResponder", "Registry store URI not provided", "Security middleware"),
)
_RESTARTS = 5  # of a part in a row, each within a minute of its start, after which `lewis up` ends


def up(
    say: Say,
    ready: Callable[[dict[str, str]], None],
    prefect_file: Path | None = None,
    serve: str | None = None,
) -> None:
    """Run servers, deployments, a worker and the receiver until Ctrl-C; a part that dies is started again.

    If `PREFECT_API_URL` or `MLFLOW_TRACKING_URI` names a server, that one is used instead of starting one.

    Args:
        say: called with each line that a part prints.
        ready: called with the URL of each part when all of them answer.
        prefect_file: what to deploy; by default, the `prefect.yaml` that comes with the project.
        serve: the recipe whose champion is served here, empty for the only one; None: no champion is served.

    Raises:
        InputError: if a port is taken, no recipe can be served, or another `lewis up` runs on this store.
        LewisError: if a part does not come up, or does not stay up.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts its background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    alone = store.lock("up")
    try:
        alone.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"`lewis up` runs on {store.home()} already (process {note.read().get('pid')}); stop it first"
        ) from None
    with alone, ExitStack() as stack:
        stack.callback(note.remove)
        note.write({})  # another `lewis up` says which process is in its way
        parts: list[Process] = []

        def add(part: Process) -> None:
            say("lewis", f"starting {part.name}")
            part.begin()
            stack.callback(part.stop)
            stack.callback(say, "lewis", f"stopping {part.name}")
            parts.append(part)

        if serve is None:
            slots.want(None)
        else:
            _apart("champion", "choose", serve)
        urls = _start_servers(add, say)
        for part in parts:  # both start at the same time, as each imports for seconds
            part.wait()
        if serve is not None:
            add(_champion(urls, say))
        places = {"prefect": prefect_database(), "mlflow": mlflow_database()}
        ours = [part.name for part in parts if part.name in places]
        known = urls | {note.database_of(part): str(places[part]) for part in ours}
        if "mlflow" in ours and settings.MLFLOW_AUTH.get():
            known["mlflow_user"] = credentials.mlflow_user()
        note.write(known)
        os.environ.setdefault(settings.MLFLOW_UI.name, urls["mlflow"])  # for links
        say("lewis", "deploying")
        _apart("deploy", "begin", *([str(prefect_file)] if prefect_file else []))
        add(Process("worker", _worker(), {}, echo=_echo("worker", say)))
        add(_receiver(urls, say))
        for part in parts:
            part.wait()
        note.write(known | urls)
        ready(urls)
        _keep_up(parts, say, {"worker": lambda: _apart("deploy", "worker-died")})


def _apart(module: str, *what: str) -> None:
    """Run `main` of a module in another process: Prefect's client would cost this one 200 MB for as long as it runs.

    Raise InputError or LewisError with what the process prints on its stdout; its log goes to this one's stderr.
    """
    command = [sys.executable, "-m", f"lewis_flows.service.{module}", *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        kind = InputError if done.returncode == 2 else LewisError
        raise kind(done.stdout.strip() or f"`{' '.join(what)}` failed, exit code {done.returncode}; see above")


def _start_servers(add: Callable[[Process], None], say: Say) -> dict[str, str]:
    """Start the servers that the environment does not name, set `PREFECT_API_URL` and its key, and return the URLs."""
    urls = {"prefect": os.environ.get("PREFECT_API_URL", "")}
    if not urls["prefect"]:
        port = usable_port("PREFECT_SERVER_API_PORT", prefect_port())
        server, urls["prefect"] = prefect_process(port, _echo("prefect", say))
        add(server)
        os.environ.update({"PREFECT_API_URL": urls["prefect"], credentials.PREFECT_SENT: PREFECT_KEY.read()})
        if PREFECT_KEY.path().exists():
            say("lewis", f"Prefect's page asks for a key, once for each browser: it is in {PREFECT_KEY.path()}")
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    urls["mlflow"] = given
    if not given.startswith("http"):
        database = given or tracking.database()
        port = usable_port("MLFLOW_PORT", os.environ.get("MLFLOW_PORT") or "5000")
        server, urls["mlflow"] = mlflow_process(port, database, _echo("mlflow", say))
        add(server)
        if settings.MLFLOW_AUTH.get():
            say("lewis", f"MLflow's page asks for {credentials.mlflow_asks_for(credentials.mlflow_user())}")
        else:
            say("lewis", "MLflow asks for no password (LEWIS_MLFLOW_AUTH=0): every user of this machine may change it")
    return urls


def _worker() -> list[str]:
    limit = str(settings.WORKER_LIMIT.get())
    only = ["--work-queue", "default"] if work_queue.queue() else []
    return ["-m", worker.__name__, "--name", worker.name_of_up(), "--limit", limit, *only]


def _receiver(urls: dict[str, str], say: Say) -> Process:
    port = usable_port(settings.WEBHOOK_PORT.name, str(settings.WEBHOOK_PORT.get()))
    urls["webhook"] = f"http://127.0.0.1:{port}/webhook"
    environment = {settings.WEBHOOK_HOST.name: "127.0.0.1", settings.WEBHOOK_PORT.name: str(port), **ONE_HEAP}
    environment["MLFLOW_TRACKING_URI"] = urls["mlflow"]  # to open the database itself takes 46 MB more
    health = f"http://127.0.0.1:{port}/health"
    return Process(
        "webhook", ["-m", "lewis_flows.service.webhook"], environment, health=health, echo=_echo("webhook", say)
    )


def _champion(urls: dict[str, str], say: Say) -> Process:
    port = usable_port(settings.UP_SERVE_PORT.name, str(settings.UP_SERVE_PORT.get()))
    urls["champion"] = f"http://127.0.0.1:{port}"
    command, health = ["-m", "lewis_flows.service.champion", "run", str(port)], f"{urls['champion']}/up"
    return Process("champion", command, {}, health=health, echo=_echo("champion", say), grace=60.0)


def _keep_up(parts: list[Process], say: Say, died: Mapping[str, Callable[[], None]]) -> None:
    """Restart each part that ends, in an endless loop, after a call of the function that `died` has for its name."""
    failures = dict.fromkeys((part.name for part in parts), 0)
    started = dict.fromkeys(failures, time.monotonic())
    while True:
        time.sleep(0.5)
        for part in parts:
            if part.ended() is None:
                continue
            failures[part.name] = failures[part.name] + 1 if time.monotonic() - started[part.name] < 60 else 1
            if failures[part.name] > _RESTARTS:
                raise LewisError(f"{part.name} does not stay up; its log is {part.log}")
            say("lewis", f"{part.name} ended with exit code {part.ended()}; starting it again")
            time.sleep(2 ** (failures[part.name] - 1) - 1)
            for step in filter(None, (died.get(part.name), part.start)):
                try:
                    step()
                except LewisError as error:  # if it has ended before it was ready, the next round counts that
                    say("lewis", str(error))
            started[part.name] = time.monotonic()


def _echo(name: str, say: Say) -> Callable[[str], None]:
    def echo(line: str) -> None:
        if not any(words in line for words in _NOISE):
            say(name, line)

    return echo
