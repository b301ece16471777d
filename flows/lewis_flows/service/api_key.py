"""The key that the Prefect servers which are started here ask for, and how processes of this store find it.

Prefect's own names for it are `PREFECT_SERVER_API_AUTH_STRING`, what a server asks for, and `PREFECT_API_AUTH_STRING`,
what a client sends. It is only ever handed on in the environment of processes, which other users cannot read.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lewis.errors import InputError
from lewis_flows.service import note, secret_file

SERVER, CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"
_NAME = "prefect-api-key"


def path() -> Path:
    """The file of the key."""
    return secret_file.path(_NAME)


def api_key() -> str:
    """What our servers ask for: `PREFECT_SERVER_API_AUTH_STRING`, or the store's key, made when missing.

    Raises:
        InputError: if others may read the file, or it is empty.
    """
    given = os.environ.get(SERVER, "").strip()
    return given or secret_file.read_or_make(_NAME, "remove it, and start `lewis up` again", prefix="lewis:")


def key_for(url: str) -> str | None:
    """What to send to a server: our key to our own, `PREFECT_API_AUTH_STRING` to the one of `PREFECT_API_URL`.

    If `PREFECT_API_URL` names the server of `lewis up` on this store, and no key is given, our key is found.
    """
    if not os.environ.get("PREFECT_API_URL"):
        return api_key()
    given = os.environ.get(CLIENT)
    return given or (api_key() if url == note.read().get("prefect") else None)


def find() -> None:
    """Before Prefect is imported: if `PREFECT_API_URL` names the server of `lewis up` on this store, send our key."""
    url = os.environ.get("PREFECT_API_URL")
    if url and (key := key_for(url)):
        os.environ[CLIENT] = key


@contextmanager
def connected(url: str) -> Iterator[None]:
    """While the block lasts, Prefect's client in this process and in those that it starts speaks to a server.

    Args:
        url: of the server's API.

    Raises:
        InputError: the server wants another key.
    """
    key = key_for(url)
    named = {"PREFECT_API_URL": url, **({CLIENT: key} if key else {})}
    before = {name: os.environ.get(name) for name in named}
    os.environ.update(named)  # before Prefect is imported, which reads it then
    import httpx
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    try:
        with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: key}):
            yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 401:
            raise
        raise InputError(f"{url}: the Prefect server wants another key; set PREFECT_API_AUTH_STRING to it") from None
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})
