"""MLflow's server, for requests that call it by its own address and come from its own pages.

    MLFLOW_SERVER_CORS_ALLOWED_ORIGINS=http://127.0.0.1:5000 python -m lewis_flows.service.mlflow_app --port 5000

It is `mlflow server`, with the arguments that it is given. By itself, MLflow takes every page of this machine for its
own, whatever its port, and every name that begins like a private address.
"""

import os
import sys
from urllib.parse import urlsplit

from starlette.types import ASGIApp

from lewis import private_names
from lewis_flows.service.own_pages import OwnPages, split_origins

ORIGINS = "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
_HOSTS = "MLFLOW_SERVER_ALLOWED_HOSTS"
_FACTORIES = {"basic-auth": "with_passwords"}


def with_passwords() -> ASGIApp:
    """MLflow with its basic authentication."""
    from mlflow.server.auth import create_app

    return OwnPages(create_app(), split_origins(os.environ[ORIGINS]))


def open_to_all() -> ASGIApp:
    """MLflow that asks for no password."""
    from mlflow.server.fastapi_app import app

    return OwnPages(app, split_origins(os.environ[ORIGINS]))


def main() -> None:
    """Serve as `mlflow server` does."""
    origins = split_origins(os.environ.get(ORIGINS, ""))
    if not origins:
        sys.exit(f"{ORIGINS}: expected the addresses of the server's own pages, such as http://127.0.0.1:5000")
    # MLflow's own check of names, as narrow.
    os.environ.setdefault(_HOSTS, ",".join(urlsplit(origin).netloc or origin for origin in origins))
    module = "lewis_flows.service.mlflow_app"
    private_names.MLFLOW_FIND_APP.put(lambda name: f"{module}:{_FACTORIES.get(name, open_to_all.__name__)}")
    from mlflow.cli import cli

    given = sys.argv[1:]
    named = any(each.partition("=")[0] == "--app-name" for each in given)
    cli(["server", *given, *([] if named else ["--app-name", "open"])])


if __name__ == "__main__":
    main()
