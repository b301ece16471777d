"""What the servers of Prefect and MLflow that are started here ask for, and how processes of this store find it.

Prefect's server asks for `PREFECT_SERVER_API_AUTH_STRING`, and a client sends `PREFECT_API_AUTH_STRING`. MLflow's has
its own basic authentication, which `LEWIS_MLFLOW_AUTH=0` switches off, with one user; more are made with MLflow's own
means. A client sends `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`; processes of this store open the
database itself and need neither. All of this is passed on only in the environment of processes, which other users
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
from lewis.store.secrets import MLFLOW_PASSWORD, PREFECT_KEY
from lewis_flows.service import note

PREFECT_SENT = "PREFECT_API_AUTH_STRING"
MLFLOW_USER = "lewis"
MLFLOW_SENT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def find() -> None:
    """Before Prefect and MLflow are imported: if the environment names the servers of `lewis up` on this store, send
    them our key, and our user and password. What the environment has already is left alone.

    Raises:
        InputError: if others may read the file of a secret, or it is empty.
    """
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
    """The key to send to a Prefect server.

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
    """While the block lasts, Prefect's client in this process and in those that it starts speaks to a server.

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
        raise TransientError(f"{url}: Prefect {how}") from error
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
    """A sentence: the user of our MLflow server, and where its password is."""
    ours = not MLFLOW_PASSWORD.variable.given() and _is_kept()
    return f"user {user} and the password in {MLFLOW_PASSWORD.path() if ours else MLFLOW_PASSWORD.variable.name}"


def mlflow_environment() -> dict[str, str]:
    """What MLflow's server with `--app-name basic-auth` needs in its environment; writes its file of settings.

    MLflow keeps the password of a database of users that exists. Each password has a database of its own, so that a
    new password counts from the next start.
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
    """Whether a database of users is whole: MLflow cannot go on with one that a first start left half made."""
    with closing(sqlite3.connect(database)) as connection:
        try:
            return connection.execute("SELECT 1 FROM users").fetchone() is not None
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise LewisError(f"{database}: the users cannot be read: {error}; try again") from error
            return False
