"""The credentials of the Prefect and MLflow servers that are started here, and how processes of this store find them.

Prefect's server asks for `PREFECT_SERVER_API_AUTH_STRING`, and a client sends `PREFECT_API_AUTH_STRING`. MLflow's
server has basic authentication, which `LEWIS_MLFLOW_AUTH=0` switches off, with one user; more are created by MLflow's
own means. A client sends `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`; processes of this store open the
database itself and need neither. Credentials are passed on only in the environment of processes, which other users
cannot read.
"""

import hashlib
import hmac
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from lewis import store
from lewis.errors import InputError, LewisError, TransientError
from lewis.redact import redacted
from lewis.store.secrets import MLFLOW_PASSWORD, PREFECT_KEY
from lewis_flows.service import note

PREFECT_SENT = "PREFECT_API_AUTH_STRING"
MLFLOW_USER = "lewis"
MLFLOW_SENT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def find() -> None:
    """Set the variables with the credentials for `lewis up` on this store, if the environment names its servers.

    Call it before Prefect and MLflow are imported. Credentials that the environment has already are kept.

    Raises:
        InputError: if others may read the file of a secret, or it is empty; or if the URL of a server is malformed.
    """
    for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        given = os.environ.get(variable, "")
        try:
            urlsplit(given)
        except ValueError as error:
            raise InputError(f"{variable}: expected a URL, got {redacted(given)!r}: {error}; correct it") from None
    url = os.environ.get("PREFECT_API_URL")
    if url and (key := key_for(url)):
        os.environ[PREFECT_SENT] = key
    url = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not url.startswith("http") or any(os.environ.get(name) for name in MLFLOW_SENT):
        return
    known = note.read()
    name = known.get("mlflow_user")
    if name and url.rstrip("/") == known.get("mlflow") and (MLFLOW_PASSWORD.variable.given() or _is_kept()):
        os.environ.update(MLFLOW_TRACKING_USERNAME=name, MLFLOW_TRACKING_PASSWORD=MLFLOW_PASSWORD.read())


def key_for(url: str) -> str | None:
    """Return the key to send to a Prefect server; None if there is none.

    The store's own key goes to loopback alone: to the server of `lewis up` on this store, and, if `PREFECT_API_URL`
    names no server, to one that was started for a command. Every other server gets `PREFECT_API_AUTH_STRING`, if that
    is set.
    """
    named, given = os.environ.get("PREFECT_API_URL"), os.environ.get(PREFECT_SENT)
    if named and given:
        return given
    ours = urlsplit(url).hostname in _LOOPBACK and (not named or url == note.read().get("prefect"))
    return PREFECT_KEY.read() if ours else given or None


@contextmanager
def connected(url: str) -> Iterator[None]:
    """Have Prefect's client, in this process and in those that it starts, use a server while the block lasts.

    Args:
        url: of the server's API.

    Raises:
        InputError: the server wants another key.
        TransientError: it does not answer, or answers with an error.
    """
    key = key_for(url)
    named = {"PREFECT_API_URL": url, **({PREFECT_SENT: key} if key else {})}
    before = {name: os.environ.get(name) for name in named}
    os.environ.update(named)  # before Prefect is imported, which reads it then
    import httpx
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    try:
        with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: key}):
            yield
    except httpx.HTTPError as error:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        if status == 401:
            raise InputError(
                f"{url}: the Prefect server wants another key; set PREFECT_API_AUTH_STRING to it"
            ) from None
        how = f"answers with an error: {error}" if status else f"does not answer ({type(error).__name__})"
        fix = "; see that it is up, or unset PREFECT_API_URL, which names it"
        named_it = not status and before["PREFECT_API_URL"] == url
        raise TransientError(f"{url}: Prefect {how}{fix if named_it else ''}") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:  # never missing in between: other threads of the receiver read it
                os.environ[name] = value


def mlflow_user() -> str:
    """The user of an MLflow server that is started here: `MLFLOW_AUTH_ADMIN_USERNAME`, or `lewis`."""
    return os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME") or MLFLOW_USER


def mlflow_asks_for(user: str) -> str:
    """Return a text for messages: the user of the MLflow server that is started here, and where the password is."""
    ours = not MLFLOW_PASSWORD.variable.given() and _is_kept()
    return f"user {user} and the password in {MLFLOW_PASSWORD.path() if ours else MLFLOW_PASSWORD.variable.name}"


def mlflow_environment() -> dict[str, str]:
    """Return the environment of MLflow's server with `--app-name basic-auth`, and write its settings file.

    MLflow does not change the password in an existing database of users. So each password has a database of its own,
    and a new password is valid from the next start.
    """
    secret = MLFLOW_PASSWORD.read()
    folder = store.make_folder(store.home() / "mlflow")
    users = folder / f"users-{hashlib.sha256(secret.encode()).hexdigest()[:16]}.db"
    if users.exists() and not _has_users(users):
        users.unlink()
    lines = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{users}".replace("%", "%%"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": "60",  # else each request takes the time that checking a password takes
    }
    file = folder / "auth.ini"
    store.write_bytes(file, "".join(["[mlflow]\n", *(f"{key} = {value}\n" for key, value in lines.items())]).encode())
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(file),
        "MLFLOW_AUTH_ADMIN_USERNAME": mlflow_user(),
        "MLFLOW_AUTH_ADMIN_PASSWORD": secret,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": hmac.new(secret.encode(), b"forms", "sha256").hexdigest(),
    }


def _is_kept() -> bool:
    return MLFLOW_PASSWORD.path().exists()


def _has_users(database: Path) -> bool:
    """Whether a database of users is complete: MLflow cannot use one that an interrupted first start has left."""
    with closing(sqlite3.connect(database)) as connection:
        try:
            return connection.execute("SELECT 1 FROM users").fetchone() is not None
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise LewisError(f"{database}: the users cannot be read: {error}; try again") from error
            return False
