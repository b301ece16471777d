"""Run MLflow's server, for requests that are sent to its own address, and not from pages of other sites.

    MLFLOW_SERVER_CORS_ALLOWED_ORIGINS=http://127.0.0.1:5000 python -m lewis_flows.service.mlflow_app --port 5000

It is `mlflow server` with the same arguments, but in one process: `mlflow server` itself waits with 200 MB next to the
server that it starts. MLflow's own check accepts every page of this machine, whatever its port, and every host name
that begins like a private address. `--prepare`: create the registry's database first and, if the store has the files of
the experiment, that too.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from starlette.types import ASGIApp

from lewis import private_names
from lewis.errors import LewisError
from lewis.quick_imports import quick_imports
from lewis_flows.service.own_pages import OwnPages, split_origins

PREPARE = "--prepare"
ORIGINS = "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
FILES = "MLFLOW_ARTIFACTS_DESTINATION"
_HOSTS = "MLFLOW_SERVER_ALLOWED_HOSTS"
_FACTORIES = {"basic-auth": "with_passwords"}
_OPEN = "open"  # any name that is not in `_FACTORIES`


def with_passwords() -> ASGIApp:
    """Return MLflow's application with its basic authentication."""
    with quick_imports():
        from mlflow.server.auth import create_app

    return OwnPages(create_app(), split_origins(os.environ[ORIGINS]))


def open_to_all() -> ASGIApp:
    """Return MLflow's application that asks for no password."""
    with quick_imports():
        from mlflow.server.fastapi_app import app

    return OwnPages(app, split_origins(os.environ[ORIGINS]))


def main() -> None:
    """Become MLflow's server, with the arguments of the command line."""
    origins = split_origins(os.environ.get(ORIGINS, ""))
    if not origins:
        sys.exit(f"{ORIGINS}: expected the addresses of the server's own pages, such as http://127.0.0.1:5000")
    # Make MLflow's own check of host names as narrow.
    os.environ.setdefault(_HOSTS, ",".join(urlsplit(origin).netloc or origin for origin in origins))
    given = [each for each in sys.argv[1:] if each != PREPARE]
    if PREPARE in sys.argv:
        from lewis.registry import tracking

        tracking.without_tables("pyarrow", "scipy")
        import uvicorn  # noqa: F401  # by this import, MLflow knows that it is a server

        try:
            _prepare()
        except LewisError as error:
            sys.exit(f"ERROR: {error}")
    module = "lewis_flows.service.mlflow_app"
    private_names.MLFLOW_FIND_APP.put(lambda name: f"{module}:{_FACTORIES.get(name, open_to_all.__name__)}")
    private_names.MLFLOW_START_SERVER.put(_become)
    from mlflow.cli import cli

    name: Any = next(each for each in cli.commands["server"].params if each.name == "app_name")
    name.type = type(name.type)([*_FACTORIES, _OPEN])  # MLflow accepts only its own names
    named = any(each.partition("=")[0] == "--app-name" for each in given)
    cli(["server", *given, *([] if named else ["--app-name", _OPEN])])


def _prepare() -> None:
    """Create the registry's database, and the experiment if its files are in the store, where clients write them.

    If they are elsewhere, the first client creates the experiment through the server, which takes the files.
    """
    from lewis import store
    from lewis.registry import tracking, versions

    if os.environ.get(FILES, own := tracking.artifacts_folder().as_uri()) == own:
        versions.configure()
        return
    with store.lock("mlflow"):
        tracking.create_database(os.environ["MLFLOW_BACKEND_STORE_URI"])


def _become(command: Sequence[str], *, extra_env: Mapping[str, str], **_: Any) -> NoReturn:
    """Run `python -m uvicorn ...` in a new interpreter, as MLflow may read what the arguments say when it is imported.

    With `--prepare`, run it in this one: `lewis up` gives no such argument, and importing MLflow again takes long.
    """
    sys.stdout.flush()
    if PREPARE not in sys.argv:
        os.execvpe(command[0], list(command), {**os.environ, **extra_env})
    from uvicorn.main import main as serve

    os.environ.update(extra_env)
    sys.exit(serve(list(command[command.index("uvicorn") + 1 :])))


if __name__ == "__main__":
    main()
