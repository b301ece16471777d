"""A run's clients wait for a Prefect server that is away, with lines in the log, and not for ever."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from lewis.registry.tracking import AwayError
from lewis_tasks.support import caching, patience
from lewis_tasks.support.patience import patient
from tests.support.service import free_port


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def later(port: int, seconds: float) -> Iterator[None]:
    """A server that answers after a while."""
    started = list[ThreadingHTTPServer]()

    def start() -> None:
        started.append(ThreadingHTTPServer(("127.0.0.1", port), Server))
        started[0].serve_forever()

    thread = threading.Timer(seconds, start)
    thread.start()
    try:
        yield
    finally:
        thread.cancel()
        for server in started:
            server.shutdown()
            server.server_close()


@pytest.fixture
def port() -> Iterator[int]:
    found = free_port()
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{found}/api"}):
        yield found


def hello() -> int:
    with get_client(sync_client=True) as client:
        return client.hello().status_code


async def hello_async() -> int:
    async with get_client() as client:
        return (await client.hello()).status_code


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_client_waits_until_the_server_is_back(
    port: int, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ask = (lambda: asyncio.run(hello_async())) if asynchronous else hello
    with pytest.raises(httpx.ConnectError):  # by itself it does not
        ask()
    with patient(), later(port, 2.5):
        assert ask() == 200
    first, last = [each.message for each in caplog.records if each.name == "lewis_tasks.support.patience"]
    assert f"http://127.0.0.1:{port} does not answer (ConnectError)" in first and "at most 300 s" in first
    assert "answers again, after" in last
    with pytest.raises(httpx.ConnectError):
        ask()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("away", [2.5, 0.0])
def test_a_database_that_is_away_is_waited_for_and_another_error_500_is_not(
    port: int, asynchronous: bool, away: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, begin = list[str](), time.monotonic()

    def answer(self: Server) -> None:
        asked.append(self.path)
        is_away = time.monotonic() - begin < away
        status = (503 if is_away else 200) if self.path == "/api/ready" else 500 if is_away or not away else 200
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    monkeypatch.setattr(Server, "do_GET", answer)
    ask = (lambda: asyncio.run(hello_async())) if asynchronous else hello
    with patient(), later(port, 0):
        if away:
            assert ask() == 200 and "does not answer (DatabaseAwayError)" in caplog.text
        else:
            with pytest.raises(httpx.HTTPStatusError, match="500"):
                ask()
            assert asked == ["/api/hello", "/api/ready"] * 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("header", ["", "1"])
def test_a_server_that_is_busy_is_asked_again_at_once_unless_it_says_when(
    port: int, asynchronous: bool, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[float]()

    def answer(self: Server) -> None:
        asked.append(time.monotonic())
        self.send_response(503 if len(asked) < 4 else 200)
        self.send_header("content-length", "0")
        if header:
            self.send_header("Retry-After", header)
        self.end_headers()

    monkeypatch.setattr(Server, "do_GET", answer)
    ask = (lambda: asyncio.run(hello_async())) if asynchronous else hello
    with later(port, 0), patient():
        assert ask() == 200 and len(asked) == 4
    between = [after - before for before, after in pairwise(asked)]
    assert min(between) >= 1 if header else max(between) < 1


def test_a_server_that_stays_busy_is_asked_at_once_for_a_while_only(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()

    def answer(self: Server) -> None:
        asked.append(time.monotonic())
        self.send_response(503)
        self.send_header("content-length", "0")
        self.end_headers()

    monkeypatch.setattr(Server, "do_GET", answer)
    monkeypatch.setattr(patience, "_BRIEFLY", 0.5)
    few = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1})
    with few, later(port, 0), patient(), pytest.raises(httpx.HTTPStatusError, match="503"):
        hello()
    pauses = [after - before for before, after in pairwise(asked) if after - before > 1]
    assert len(pauses) == 1, "Prefect's own, between two attempts"


def test_it_gives_up_with_a_sentence(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_SERVER_WAIT_SECONDS", "2")
    reasons = list[str]()
    with patient(reasons.append):
        begin = time.monotonic()
        for _ in range(2):  # the second has nothing to wait for
            with pytest.raises(httpx.TransportError, match="has not answered for"):
                hello()
        assert 2 <= time.monotonic() - begin < 20
    assert len(reasons) == 2 and all(f"http://127.0.0.1:{port} has not answered for" in each for each in reasons)


def test_events_are_kept_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_SERVER_WAIT_SECONDS", "77")
    given = list[dict[str, object]]()
    monkeypatch.setattr(EventsWorker, "set_client_override", lambda kind, **options: given.append(options))
    with patient():
        assert given == [{"reconnection_attempts": 77}]
    assert given[1:] == [{}]


def test_a_task_waits_for_a_server_before_it_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = free_port()
    error = AwayError("MLflow: registering: it does not answer", f"http://127.0.0.1:{found}")
    with later(found, 1.5):
        assert caching._heals(error)
    first, last = [each.message for each in caplog.records if each.name == caching.__name__]
    assert first.startswith(f"{error.url} does not answer since ") and first.endswith("at most 300 s")
    assert last.startswith(f"{error.url} answers again, after ")
    monkeypatch.setenv("LEWIS_SERVER_WAIT_SECONDS", "1")
    assert not caching._heals(error)
