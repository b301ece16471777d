"""Make runs wait while Prefect's server is away, such as when `lewis up` starts it again after it died.

They also wait while the server's database is away: then the server answers 500, and `/ready` says so.

By itself, Prefect's client retries for a minute, at ever longer intervals; a new client, such as that of an artifact,
does not retry at all. Its events, from which the server knows the states of tasks, are lost after ten seconds.

On SQLite, a request that writes next to another one is answered 503 at once. Prefect's client asks again after two
seconds, which cost a run of many short tasks a quarter of its time and more; here it asks again at once.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import SettingsContext, get_settings_context

from lewis import private_names, settings
from lewis_tasks.support.caching import REMIND, STOPPING

logger = logging.getLogger(__name__)
_AWAY = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout, httpx.ReadTimeout, httpx.WriteTimeout)
_PAUSE = 1.0  # seconds between two attempts
_BRIEFLY = 3.0  # seconds for which a request that is answered 503 is sent again without Prefect's long pauses
_BROKEN = httpx.codes.INTERNAL_SERVER_ERROR


class DatabaseAwayError(Exception):
    """Raised within this module if the server answers 500, and `/ready` says that its database is away."""


def begin(*, events: bool = True) -> None:
    """Make Prefect's client wait for its server until this process, of a worker's run or a task runner, ends.

    Args:
        events: whether this process sends its own events; a process of a pool passes them to its parent.
    """
    if not _always:
        _always.append(_put(_Outage(None), events=events))


_always = list[Callable[[], None]]()  # no open context: Python would close it at exit, too late


@contextmanager
def patient(given_up: Callable[[str], object] | None = None) -> Iterator[None]:
    """While the block lasts, Prefect's client in this process waits for a server that does not answer.

    Args:
        given_up: called with a sentence if it has waited for `LEWIS_SERVER_WAIT_SECONDS`. Without it, or if it returns,
            the request fails.
    """
    undo = _put(_Outage(given_up))
    try:
        yield
    finally:
        undo()


@contextmanager
def impatient(seconds: float, retries: int = 0) -> Iterator[SyncPrefectClient]:
    """Yield a client of Prefect's server that gives up early, for requests that may stay unanswered.

    Args:
        seconds: time limit of one request.
        retries: how often the client asks again.
    """
    context = get_settings_context()
    client_settings = context.settings.client.model_copy(update={"max_retries": retries})
    few = context.settings.model_copy(update={"client": client_settings})  # `temporary_settings` takes 50 ms
    with (
        SettingsContext(profile=context.profile, settings=few),
        get_client(sync_client=True, httpx_settings={"timeout": seconds}) as client,
    ):
        yield client


def _put(outage: "_Outage", *, events: bool = True) -> Callable[[], None]:
    """Make Prefect's client wait for its server; return the function that undoes this."""
    ask, ask_async = private_names.PREFECT_RETRY.get(), private_names.PREFECT_RETRY_ASYNC.get()
    put_events = private_names.PREFECT_EVENTS_CLIENT.get()

    def patiently(self: Any, request: Any, send: Any, *arguments: Any, **named: Any) -> Any:
        return ask(self, request, outage.waiting(send), *arguments, **named)

    async def patiently_async(self: Any, request: Any, send: Any, *arguments: Any, **named: Any) -> Any:
        return await ask_async(self, request, outage.waiting_async(send), *arguments, **named)

    def undo() -> None:
        private_names.PREFECT_RETRY.put(ask)
        private_names.PREFECT_RETRY_ASYNC.put(ask_async)
        if events:
            put_events(None)

    private_names.PREFECT_RETRY.put(patiently)
    private_names.PREFECT_RETRY_ASYNC.put(patiently_async)
    if events:
        from prefect.events.clients import PrefectEventsClient

        put_events(PrefectEventsClient, reconnection_attempts=settings.SERVER_WAIT.get())  # one a second
    return undo


class _Outage:
    """The current outage of the server, if any, for all requests of this process: since when, and when last logged."""

    def __init__(self, given_up: Callable[[str], object] | None) -> None:
        self._given_up, self._lock = given_up, threading.Lock()
        self._since: float | None = None  # as time.monotonic(), like `_logged`
        self._logged: float | None = None

    def look(self, request: httpx.Request, error: Exception, began: float) -> None:
        """Log, every `REMIND` seconds, that a request waits for the server.

        Raises:
            httpx.TransportError: if it has waited long enough, or the process must stop. Prefect's client does not
                retry after this error.
        """
        now, limit = time.monotonic(), settings.SERVER_WAIT.get()
        server = f"{request.url.scheme}://{request.url.netloc.decode()}"
        with self._lock:
            self._since = min(self._since or began, began)
            waited = now - self._since
            if waited >= _PAUSE and (self._logged is None or now - self._logged >= REMIND):
                self._logged = now
                logger.warning(
                    "the Prefect server at %s does not answer (%s) since %.0f s; waiting for it, at most %.0f s",
                    *(server, type(error).__name__, waited, limit),
                )
        if waited < limit and not STOPPING.is_set():
            return
        reason = f"the Prefect server at {server} has not answered for {waited:.0f} s (LEWIS_SERVER_WAIT_SECONDS)"
        if self._given_up and not STOPPING.is_set():
            self._given_up(reason)
        raise httpx.TransportError(reason, request=request) from error

    def end(self) -> None:
        """Note that the server has answered, and log that if its absence was logged."""
        if self._since is None:
            return
        with self._lock:
            if self._logged is not None and self._since is not None:
                logger.warning("the Prefect server answers again, after %.0f s", time.monotonic() - self._since)
            self._since = self._logged = None

    def waiting(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function `send`: the result sends a request again and again until there is an answer."""

        async def sent(*arguments: Any, **named: Any) -> Any:
            return send(*arguments, **named)

        async def sleep(seconds: float) -> None:
            time.sleep(seconds)

        def send_and_wait(request: httpx.Request, *arguments: Any, **named: Any) -> Any:
            try:  # without an event loop, since nothing in it suspends
                self._answer(sent, sleep, request, *arguments, **named).send(None)
            except StopIteration as answered:
                return answered.value

        return send_and_wait

    def waiting_async(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the `send` of an asynchronous client as `waiting` does."""
        return partial(self._answer, send, asyncio.sleep)

    async def _answer(
        self,
        send: Callable[..., Awaitable[Any]],
        sleep: Callable[[float], Awaitable[None]],
        request: httpx.Request,
        *arguments: Any,
        **named: Any,
    ) -> Any:
        began, again = time.monotonic(), True
        while True:
            pause = _PAUSE
            try:
                answer = await send(request, *arguments, **named)
                if answer.status_code == _BROKEN:
                    _check(await send(_whether_ready(request), *arguments, **named))
            except (*_AWAY, DatabaseAwayError) as error:
                self.look(request, error, began)
                again = True
            else:
                pause = _pause_after(answer, time.monotonic() - began, again=again)
                again = again and answer.status_code != _BROKEN
                if not pause:
                    self.end()
                    return answer
            await sleep(pause)


def _pause_after(answer: httpx.Response, waited: float, *, again: bool) -> float:
    """Return after how many seconds a request is to be sent again; 0 if this answer to it counts.

    Args:
        answer: what the server answered.
        waited: seconds since the request was sent for the first time.
        again: whether an error 500 may be of a server that has just become ready.
    """
    busy = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and "Retry-After" not in answer.headers
    if busy and waited < _BRIEFLY:
        return random.uniform(0.5, 1) * max(waited, 0.05)  # ever longer
    return _PAUSE if again and answer.status_code == _BROKEN else 0.0


def _whether_ready(request: httpx.Request) -> httpx.Request:
    """Return the request that asks the server of another request whether its database answers."""
    before, api, _ = str(request.url).partition("/api/")
    known = {name: request.headers[name] for name in ("authorization",) if name in request.headers}
    return httpx.Request("GET", f"{before}{api}ready", headers=known, extensions=request.extensions)


def _check(ready: httpx.Response) -> None:
    if ready.status_code >= _BROKEN:
        raise DatabaseAwayError
