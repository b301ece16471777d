"""The whole service on loopback: for one command a Prefect server, or everything in the foreground with `lewis up`."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from lewis import store
from lewis.errors import InputError, LewisError
from lewis_flows.service.processes import Process, answers, free_port, usable_port

Say = Callable[[str, str], None]
"""Called with the name of a part and a line it says."""

_NOISE = (
    *(" ___ ___ ", "| _ \\ _ \\", "|  _/ ", "|_| |_|_"),  # Prefect's name in letters
    "already in terminal state",  # of a run that ended on the very beat
    *("StarletteDeprecationWarning", "import WSGIResponder", "Registry store URI not provided", "Security middleware"),
)
_RESTARTS = 5  # in a row, each within a minute of its start: then the part is given up


@contextmanager
def prefect_server() -> Iterator[str]:
    """Give the URL of a Prefect API: the user's own, that of `lewis up`, or of a server started for this block.

    The server keeps its database in the store, so the next one shows all runs; it dies with this process, however
    that ends.

    Raises:
        LewisError: if the server does not come up, with where to read why.
    """
    note = store.read_json(_note()) or {}  # of a `lewis up`
    served = note.get("prefect")
    running = os.environ.get("PREFECT_API_URL") or (served if served and answers(f"{served}/health") else None)
    if running:
        if running == served:
            os.environ.setdefault("LEWIS_MLFLOW_UI", note.get("mlflow", ""))
        yield running
        return
    server, url = _prefect(free_port(), None)
    server.start()
    try:
        yield url
        time.sleep(1)  # let it store the last events
    finally:
        server.stop()


def up(say: Say, ready: Callable[[dict[str, str]], None], prefect_file: Path | None = None) -> None:
    """Run the service until Ctrl-C: servers, deployments, a worker, the receiver; what dies is started again.

    `PREFECT_API_URL` and `MLFLOW_TRACKING_URI` of servers that exist are used instead of starting those.

    Args:
        say: is given the parts' output, line by line.
        ready: called with the URL of each part when all of them answer.
        prefect_file: what to deploy; by default, `deployments/prefect.yaml` of this checkout.

    Raises:
        InputError: if a port is taken, or another `lewis up` runs on this store.
        LewisError: if a part does not come up, or does not stay up.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background job of a shell starts with it ignored
        signal.signal(number, signal.default_int_handler)
    alone = store.lock("up")
    try:
        alone.acquire(timeout=0)
    except Timeout:
        note = store.read_json(_note()) or {}
        raise InputError(
            f"`lewis up` runs on {store.home()} already (process {note.get('pid')}); stop it first"
        ) from None
    with alone, ExitStack() as stack:
        stack.callback(_note().unlink, missing_ok=True)
        parts: list[Process] = []

        def add(part: Process) -> None:
            say("lewis", f"starting {part.name}")
            part.start()
            stack.callback(part.stop)
            stack.callback(say, "lewis", f"stopping {part.name}")
            parts.append(part)

        urls = _start_servers(add, say)
        store.write_json(_note(), {**urls, "pid": os.getpid()})
        _prepare_server(say, prefect_file)
        add(Process("worker", _worker(), {"LEWIS_MLFLOW_UI": urls["mlflow"]}, echo=_echo("worker", say)))
        add(_receiver(urls, say))
        store.write_json(_note(), {**urls, "pid": os.getpid()})
        ready(urls)
        _keep_up(parts, say, prefect_file)


def _start_servers(add: Callable[[Process], None], say: Say) -> dict[str, str]:
    """Start what is not given: gives the URLs, and puts that of Prefect into the environment."""
    urls = {"prefect": os.environ.get("PREFECT_API_URL", "")}
    if not urls["prefect"]:
        server, urls["prefect"] = _prefect(usable_port("PREFECT_SERVER_API_PORT", 4200), _echo("prefect", say))
        add(server)
        os.environ["PREFECT_API_URL"] = urls["prefect"]
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    urls["mlflow"] = given
    if not given.startswith("http"):
        from lewis.registry import versions

        versions.configure()
        database = given or f"sqlite:///{store.home() / 'mlflow' / 'mlflow.db'}"
        port = usable_port("MLFLOW_PORT", 5000)
        urls["mlflow"] = f"http://127.0.0.1:{port}"
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", database, "--uvicorn-opts", "--log-level warning"]
        # Two processes instead of fifteen: nothing here uses MLflow's job queue.
        environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        add(Process("mlflow", command, environment, health=f"{urls['mlflow']}/health", echo=_echo("mlflow", say)))
    return urls


def _prefect(port: int, echo: Callable[[str], None] | None) -> tuple[Process, str]:
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_LOGGING_LEVEL": os.environ.get("PREFECT_SERVER_LOGGING_LEVEL", "WARNING"),
        # Kept on disk, so that a server that is started again still knows who holds the device.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    return Process("prefect", ["-m", "prefect", "server", "start"], environment, health=f"{url}/health", echo=echo), url


def _prepare_server(say: Say, prefect_file: Path | None) -> None:
    # Prefect reads PREFECT_API_URL when it is first imported, which must come after the server has its port.
    from lewis_flows.service import deploy
    from lewis_flows.turn import crash_dead_runs, drop_missed_polls

    say("lewis", "deploying")
    crash_dead_runs()
    drop_missed_polls()
    recipes = deploy.deploy(prefect_file or deploy.PREFECT_YAML)
    say("lewis", f"recipes: {', '.join(recipes) or 'none'}")


def _worker() -> list[str]:
    limit = os.environ.get("LEWIS_WORKER_LIMIT", "4")
    name = f"lewis-{socket.gethostname()}"
    return [
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        "lewis",
        "--type",
        "process",
        "--name",
        name,
        "--limit",
        limit,
    ]


def _receiver(urls: dict[str, str], say: Say) -> Process:
    port = usable_port("LEWIS_WEBHOOK_PORT", 4300)
    urls["webhook"] = f"http://127.0.0.1:{port}/webhook"
    environment = {"LEWIS_WEBHOOK_HOST": "127.0.0.1", "LEWIS_WEBHOOK_PORT": str(port)}
    health = f"http://127.0.0.1:{port}/health"
    return Process(
        "webhook", ["-m", "lewis_flows.service.webhook"], environment, health=health, echo=_echo("webhook", say)
    )


def _keep_up(parts: list[Process], say: Say, prefect_file: Path | None) -> None:
    """Start again what ends, and deploy again when a recipe comes or goes."""
    from lewis_flows import recipes_folder

    failures = dict.fromkeys((part.name for part in parts), 0)
    started = dict.fromkeys(failures, time.monotonic())
    recipes, looked = recipes_folder.names(), time.monotonic()
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
            part.start()
            started[part.name] = time.monotonic()
        if time.monotonic() - looked > 5:
            looked = time.monotonic()
            if (now := recipes_folder.names()) != recipes:
                recipes = now
                _prepare_server(say, prefect_file)


def _echo(name: str, say: Say) -> Callable[[str], None]:
    def echo(line: str) -> None:
        if not any(words in line for words in _NOISE):
            say(name, line)

    return echo


def _note() -> Path:
    return store.home() / "service.json"
