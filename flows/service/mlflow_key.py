"""User and password of an MLflow server that is started here, if `LEWIS_MLFLOW_AUTH` is 1.

The server is then MLflow's own with basic authentication. It is off by default: the pictures in the pages of Prefect's
artifacts come from MLflow, and a browser asks for no password for the picture of another page. The server has one user;
more are made with MLflow's own means. Processes of this store open the database of MLflow itself and need no password.
Others send `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`.
"""

import hashlib
import hmac
import importlib.util
import os
from pathlib import Path

from lewis import store
from lewis.errors import InputError
from lewis_flows.service import secret_file

USER = "lewis"
_NAME = "mlflow-password"


def wanted() -> bool:
    """Whether a server that is started here asks for a password.

    Raises:
        InputError: if `LEWIS_MLFLOW_AUTH` is neither 0 nor 1, or what the server needs for it is not installed.
    """
    given = os.environ.get("LEWIS_MLFLOW_AUTH") or "0"
    if given not in ("0", "1"):
        raise InputError(f"LEWIS_MLFLOW_AUTH: expected 0 or 1, got {given!r}; set or unset it")
    if given == "1" and importlib.util.find_spec("flask_wtf") is None:
        raise InputError("LEWIS_MLFLOW_AUTH: MLflow's server with passwords needs flask-wtf; install the extra `auth`")
    return given == "1"


def path() -> Path:
    """The file of the password."""
    return secret_file.path(_NAME)


def password() -> str:
    """What the server asks for: `MLFLOW_AUTH_ADMIN_PASSWORD`, or the store's password, made when missing.

    Raises:
        InputError: if others may read the file, or it is empty.
    """
    given = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "").strip()
    return given or secret_file.read_or_make(_NAME, "remove it, and start `lewis up` again")


def server_environment() -> dict[str, str]:
    """What MLflow's server with `--app-name basic-auth` needs in its environment; writes its file of settings.

    MLflow keeps the password of a database of users that exists. Each password has a database of its own, so that a
    new password counts from the next start.
    """
    secret = password()
    folder = store.make_folder(store.home() / "mlflow")
    users = folder / f"users-{hashlib.sha256(secret.encode()).hexdigest()[:16]}.db"
    settings = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{users}".replace("%", "%%"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": "60",  # else each request takes the time that checking a password takes
    }
    file = folder / "auth.ini"
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    store.write_bytes(file, "".join(["[mlflow]\n", *lines]).encode())
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(file),
        "MLFLOW_AUTH_ADMIN_USERNAME": os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": secret,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": hmac.new(secret.encode(), b"forms", "sha256").hexdigest(),
    }
