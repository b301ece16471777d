"""Requests to the servers of targets: no redirects, errors that say what to do, no secret in a message."""

import io
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from threading import Thread
from typing import Any

from lewis import settings
from lewis.errors import LewisError, TransientError
from lewis.serving import slots
from lewis.store.secrets import UP_SERVE_KEY

_SHOWN = 500  # characters of an answer that an error message shows
_LATER = 1.0  # seconds after its own timeout in which `requests` says what the server did not do in time
_PASSES = (408, 425, 429)  # statuses below 500 after which another try may succeed


def send(
    method: str,
    url: str,
    *,
    body: Any = None,
    data: bytes | None = None,
    form: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 30,
    accepted: tuple[int, ...] = (),
    ca: str | None = None,
) -> Any:
    """Send a request and return the `requests.Response`.

    Args:
        method: such as POST.
        url: where to.
        body: sent as JSON.
        data: sent as it is.
        form: sent as the fields of an HTML form.
        headers: in addition to those that `requests` sends by itself.
        timeout_s: for the connection, for the first byte of the answer, and for all of it.
        accepted: statuses that are no error, in addition to those below 300.
        ca: file of the CA certificates that the server's certificate is checked by; None: this machine's.

    Raises:
        TransientError: if the server does not answer in time, or is busy.
        LewisError: if it refuses, or cannot be asked: the URL or the key is malformed, or its answer is no HTTP.
    """
    import requests
    from urllib3.exceptions import HTTPError

    end = time.monotonic() + timeout_s
    server = "/".join(url.split("/")[:3])  # in messages; the path of a webhook may be its secret
    ask = partial(
        requests.request,
        method,
        url,
        json=body,
        data=data or form,
        headers=headers,
        timeout=timeout_s,
        allow_redirects=False,
        verify=ca or True,
        stream=True,
    )
    try:
        answer = _within(timeout_s + _LATER, ask)
        with closing(answer.raw) as raw:
            answer.raw = io.BytesIO(_whole(raw, end))
    except ValueError as error:
        fix = "see that its URL is right, that it speaks HTTP, and that LEWIS_SERVE_KEY has letters of ISO 8859-1 alone"
        raise LewisError(f"{server} cannot be asked ({type(error).__name__}); {fix}") from None
    except (requests.RequestException, HTTPError, TimeoutError) as error:
        why = f"does not answer ({type(error).__name__}); see that it is up"
        raise TransientError(f"{server} {why}") from None
    status = answer.status_code
    if status < 300 or status in accepted:
        return answer
    kind = TransientError if status >= 500 or status in _PASSES else LewisError
    raise kind(f"{server} answered {status}: {' '.join(answer.text.split())[:_SHOWN] or 'nothing'}")


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """Call `ask` and return its result; raise TimeoutError after some seconds.

    `requests` has a limit for each byte of the headers of an answer alone, which a server may send bit by bit.
    """
    answered: Future[Any] = Future()

    def run() -> None:
        try:
            answered.set_result(ask())
        except BaseException as error:
            answered.set_exception(error)

    Thread(target=run, daemon=True).start()
    return answered.result(seconds)


def _whole(raw: Any, end: float) -> bytes:
    """Read the body of an answer; raise TimeoutError if a server that sends it bit by bit takes until `end`."""
    read = bytearray()
    while part := raw.read1(1 << 16, decode_content=True):
        read += part
        if time.monotonic() > end:
            raise TimeoutError
    return bytes(read)


def json_of(answer: Any) -> Any:
    """Return the JSON that an answer is; raise ValueError if it is none, or is nested too deep to be read."""
    try:
        return answer.json()
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def with_key(url: str) -> dict[str, str]:
    """The header with the key for a server: that of `lewis up --serve` for its own, else `LEWIS_SERVE_KEY`, if set."""
    key = UP_SERVE_KEY.read() if slots.is_ours(url) else settings.SERVE_KEY.get()
    return {"Authorization": f"Bearer {key}"} if key else {}
