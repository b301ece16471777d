"""User and password of the MLflow server that `lewis up` starts, and how processes of this store find them.

The server is MLflow's own with basic authentication; `LEWIS_MLFLOW_AUTH=0` switches that off. It has one user; more are
made with MLflow's own means. Processes of this store open the database of MLflow itself and need no password. Others
send `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`. Both are only ever handed on in the environment of
processes, which other users cannot read.
"""

import hashlib
import hmac
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from lewis import store
from lewis.errors import InputError
from lewis_flows.service import note, secret_file

USER = "lewis"
_NAME = "mlflow-password"
_SENT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def wanted() -> bool:
    """Whether a server that is started here asks for a password.

    Raises:
        InputError: if `LEWIS_MLFLOW_AUTH` is neither 0 nor 1.
    """
    given = os.environ.get("LEWIS_MLFLOW_AUTH") or "1"
    if given not in ("0", "1"):
        raise InputError(f"LEWIS_MLFLOW_AUTH: expected 0 or 1, got {given!r}; set or unset it")
    return given == "1"


def user() -> str:
    """The user of a server that is started here: `MLFLOW_AUTH_ADMIN_USERNAME`, or `lewis`."""
    return os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME") or USER


def asked_for(name: str) -> str:
    """What the page of our server asks for, and where that is: words without the password.

    Args:
        name: of the user.
    """
    ours = not _given() and path().exists()
    return f"user {name} and the password in {path() if ours else 'MLFLOW_AUTH_ADMIN_PASSWORD'}"


def find() -> None:
    """If `MLFLOW_TRACKING_URI` names the server of `lewis up` on this store, send it our user and password.

    A user, password or token that the environment has already is left alone.

    Raises:
        InputError: if others may read the file of the password, or it is empty.
    """
    url = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not url.startswith("http") or any(os.environ.get(name) for name in _SENT):
        return
    known = note.read()
    name = known.get("mlflow_user")
    if name and url.rstrip("/") == known.get("mlflow") and (_given() or path().exists()):
        os.environ.update(MLFLOW_TRACKING_USERNAME=name, MLFLOW_TRACKING_PASSWORD=password())


def path() -> Path:
    """The file of the password."""
    return secret_file.path(_NAME)


def password() -> str:
    """What the server asks for: `MLFLOW_AUTH_ADMIN_PASSWORD`, or the store's password, made when missing.

    Raises:
        InputError: if others may read the file, or it is empty.
    """
    return _given() or secret_file.read_or_make(_NAME, "remove it, and start `lewis up` again")


def server_environment() -> dict[str, str]:
    """What MLflow's server with `--app-name basic-auth` needs in its environment; writes its file of settings.

    MLflow keeps the password of a database of users that exists. Each password has a database of its own, so that a
    new password counts from the next start.
    """
    secret = password()
    folder = store.make_folder(store.home() / "mlflow")
    users = folder / f"users-{hashlib.sha256(secret.encode()).hexdigest()[:16]}.db"
    if users.exists() and not _has_users(users):
        users.unlink()
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
        "MLFLOW_AUTH_ADMIN_USERNAME": user(),
        "MLFLOW_AUTH_ADMIN_PASSWORD": secret,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": hmac.new(secret.encode(), b"forms", "sha256").hexdigest(),
    }


def _given() -> str:
    return os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "").strip()


def _has_users(database: Path) -> bool:
    """Whether a database of users is whole: MLflow cannot go on with one that a first start left half made."""
    with closing(sqlite3.connect(database)) as connection:
        try:
            return connection.execute("SELECT 1 FROM users").fetchone() is not None
        except sqlite3.OperationalError:  # not even the table is there
            return False
