"""The servers of Prefect and MLflow on loopback, and a Prefect server that runs only as long as one command.

Both refuse requests to another address than one of this machine, and requests from pages of other sites. Prefect's
server also asks for a key, because someone who may start its runs may run code.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lewis import settings, store
from lewis.errors import InputError
from lewis.registry import tracking
from lewis.store.secrets import PREFECT_KEY, UP_SERVE_KEY
from lewis_flows.service import credentials, mlflow_app, note
from lewis_flows.service.own_pages import own_origins
from lewis_flows.service.processes import Process, answers, free_port, release

OPENAI = ("OPENAI_BASE_URL", "OPENAI_API_KEY")  # variables by which clients of the OpenAI API find a server
RECIPES = "/deployments?deployments.tags.name=lewis"
"""The page of a Prefect server that shows the recipes' deployments, by their tag, and not those of the service."""
_ORIGINS = ("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS")  # one setting, two names
_PREFECT_DATABASE = (
    *("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"),
    *("PREFECT_SERVER_DATABASE_HOST", "PREFECT_API_DATABASE_HOST"),
)
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a server, whose threads take turns: a heap for each one would keep some MB more of freed memory."""
_DEFAULTS = {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,orphans",  # logs of runs that retention has deleted
    # Seconds between two loops of a service of the server, by default five: a third of its load while nothing runs.
    # So it takes some seconds longer until a run is shown as late, an approval lapses, or another hour is planned.
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "20",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS": "30",
    "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_LOOP_SECONDS": "20",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "15",
}


@contextmanager
def prefect_server(
    died: Callable[[str], None] | None = None, *, meanwhile: Callable[[str], object] | None = None
) -> Iterator[str]:
    """Give the URL of a Prefect API: the user's own, that of `lewis up`, or one of a server started for this block.

    `credentials.connected` lets Prefect's client use it. A server that is started keeps its database in the store, so
    the next one shows all runs. It ends with this process, even if this process is killed.

    Args:
        died: called from a thread, with a sentence, if the server that was started ends before the block does. It
            must end this process: Prefect's client would go on for minutes, and end in errors of its own.
        meanwhile: called with the URL while a server that was started is not ready yet.

    Raises:
        LewisError: if the server does not come up; names its log.
    """
    if found := running():
        yield found
        return
    port = free_port()
    server, url = prefect_process(port)
    server.begin()
    try:
        if meanwhile:
            meanwhile(url)
    except BaseException:
        server.stop()
        raise
    server.wait()
    over = threading.Event()

    def watch() -> None:
        while died and not over.wait(0.1):
            if (code := server.ended()) is not None:
                died(f"the Prefect server of this run ended with exit code {code}; its log is {server.log}")
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield url
    finally:
        time.sleep(1)  # so that it stores the last events; if the block failed since it died, that is the error instead
        over.set()
        watcher.join()
        server.stop()
        release(port)


def running() -> str | None:
    """Return the URL of the Prefect API that the environment names, or that of `lewis up` if it answers; else None."""
    known = note.read()
    served = known.get("prefect")
    found = os.environ.get("PREFECT_API_URL") or (served if served and answers(f"{served}/health") else None)
    if found and found == served:
        os.environ.setdefault(settings.MLFLOW_UI.name, known.get("mlflow", ""))  # where the pages of versions are
    return found


def prefect_port() -> str:
    """The port of `lewis up`'s Prefect server."""
    return os.environ.get("PREFECT_SERVER_API_PORT") or "4200"


def client_environment() -> dict[str, str]:
    """Return the variables with the addresses and credentials of this store's servers, for clients of their APIs.

    A server that the environment names is kept, as is its user or key. Without a server, MLflow's address is the
    database in the store, and there is none of Prefect. With `lewis up --serve`, there are those of the OpenAI API too.
    """
    prefect, known = running(), note.read()  # the note of a service that was killed may still be there
    alive = prefect is not None and prefect == known.get("prefect")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = known["mlflow"] if alive else tracking.database()
    credentials.find()
    names = ("MLFLOW_TRACKING_URI", *credentials.MLFLOW_SENT)
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    if prefect:
        found["PREFECT_API_URL"] = prefect
        if key := credentials.key_for(prefect):
            found[credentials.PREFECT_SENT] = key
    if alive and "champion" in known and not any(os.environ.get(name) for name in OPENAI):
        found |= zip(OPENAI, (f"{known['champion']}/v1", UP_SERVE_KEY.read()), strict=True)
    return found


def prefect_database() -> Path | str:
    """The database of a Prefect server that is started here: its file, or the URL of a server, without a password."""
    home = os.environ.get("PREFECT_HOME") or store.home() / "prefect"
    given = next(filter(None, map(os.environ.get, _PREFECT_DATABASE)), "")
    return tracking.place_of(given) if given else Path(os.path.abspath(Path(home).expanduser() / "prefect.db"))


def mlflow_database() -> Path | str:
    """The database of MLflow: its file, or the URL of a server, without a password."""
    return tracking.place_of(os.environ.get("MLFLOW_TRACKING_URI") or tracking.database())


def check_mlflow_as_served() -> None:
    """Check that commands of this shell have the MLflow of the `lewis up` that runs on this store, if one does.

    Raises:
        InputError: if this environment names another one.
    """
    known, here = note.read(), mlflow_database()
    served = [tracking.place_of(known[key]) for key in (note.database_of("mlflow"), "mlflow") if known.get(key)]
    if served and os.path.realpath(here) not in map(os.path.realpath, served):
        raise InputError(
            f"MLflow: `lewis up` on {store.home()} has {' or '.join(map(str, served))}, and by this environment it is "
            f"{here}; set MLFLOW_TRACKING_URI as `lewis up` has it"
        )


def prefect_process(port: int, echo: Callable[[str], None] | None = None) -> tuple[Process, str]:
    """A Prefect server on loopback, not started yet, and the URL of its API."""
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **ONE_HEAP,
        # An event is on disk, and so known for good, a second after the server took it, instead of five.
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
        PREFECT_KEY.variable.name: PREFECT_KEY.read(),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS": "lewis_flows.service.prefect_log.Console",
    }
    defaults = {**_DEFAULTS, "PREFECT_UI_URL": f"http://127.0.0.1:{port}"}  # else notifications link to None
    environment |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    if not any(name in os.environ for name in _ORIGINS):
        environment[_ORIGINS[0]] = ",".join(own_origins(port))
    command = ["-m", "lewis_flows.service.prefect_app"]
    return Process("prefect", command, environment, health=f"{url}/health", echo=echo, private=True), url


def mlflow_process(port: int, database: str, echo: Callable[[str], None] | None = None) -> tuple[Process, str]:
    """An MLflow server on loopback, not started yet, and its URL; with a password unless `LEWIS_MLFLOW_AUTH` is 0.

    Args:
        database: its URL, as MLflow's `MLFLOW_BACKEND_STORE_URI`.
    """
    url = f"http://127.0.0.1:{port}"
    command = ["-m", mlflow_app.__name__, mlflow_app.PREPARE, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    # One process instead of fifteen: nothing here uses MLflow's job queue.
    # The database is no argument, since all users of a machine see the arguments of its processes.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": database, **ONE_HEAP}
    environment[mlflow_app.ORIGINS] = os.environ.get(mlflow_app.ORIGINS) or ",".join(own_origins(port))
    # For files of experiments that others create through this server; else they would go into its working directory.
    files = mlflow_app.FILES
    environment[files] = os.environ.get(files) or tracking.artifacts_folder().as_uri()
    if settings.MLFLOW_AUTH.get():
        command += ["--app-name", "basic-auth"]
        environment |= credentials.mlflow_environment()
    return Process("mlflow", command, environment, health=f"{url}/health", echo=echo, private=True), url
