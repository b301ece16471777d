"""What a server sends as its answer, and how: bit by bit, or nested too deep."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lewis import store
from lewis.errors import LewisError, TransientError
from lewis.recipe.serve import VllmTarget
from lewis.serving import haproxy_socket, slots, vllm
from lewis.serving.requests_to import send
from tests.support.http_sink import HttpSink


@contextmanager
def dripping(server: socket.socket, begin: bytes, pause: float = 0.05) -> Iterator[None]:
    """A server that answers with `begin`, then with a hundred bytes, one after each pause."""

    def answer() -> None:
        connection = server.accept()[0]
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(begin)
            for _ in range(100):
                time.sleep(pause)
                connection.sendall(b" ")

    with server:
        threading.Thread(target=answer, daemon=True).start()
        yield


def test_a_server_that_sends_its_answer_byte_by_byte_has_no_more_time_than_others() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    url = "http://{}:{}".format(*server.getsockname())
    with dripping(server, b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"):
        began = time.monotonic()
        with pytest.raises(TransientError, match=r"does not answer \(TimeoutError\)"):
            send("GET", url, timeout_s=0.3)
        assert time.monotonic() - began < 2


def test_nor_has_one_that_sends_its_headers_byte_by_byte() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    url = "http://{}:{}".format(*server.getsockname())
    with dripping(server, b"HTTP/1.1 200 OK\r\nx: ", pause=0.2):
        began = time.monotonic()
        with pytest.raises(TransientError, match=r"does not answer \(TimeoutError\)"):
            send("GET", url, timeout_s=0.3)
        assert time.monotonic() - began < 5


def test_haproxy_has_no_more_time_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has a limit
    monkeypatch.setattr(haproxy_socket, "_SECONDS", 0.3)
    server = socket.socket(socket.AF_UNIX)
    server.bind("s")
    server.listen()
    with dripping(server, b"1"):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            haproxy_socket.ask("s", "show info")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"data": [[]]}', '{"data": null}', '{"data": ["a"]}'])
def test_an_answer_of_another_form_is_an_error(text: str) -> None:
    with HttpSink(lambda _: text) as server, pytest.raises(LewisError, match="is this a vLLM server"):
        vllm.models(VllmTarget(kind="vllm", url=server.url))


@pytest.mark.parametrize("text", ["[1]", '{"slots": 3}', '{"slots": {"blue": {"newer": 1}}}', '{"writer": "a-1"}'])
def test_a_state_of_the_slots_that_another_release_wrote_stops_no_request(text: str, home: Path) -> None:
    """Each request to a server asks there whether that is one of ours, and so for its key."""
    for name in ("champion.json", "champion-now.json"):
        store.write_text(home / name, text)
    assert slots.wanted() is None and not slots.is_ours("http://127.0.0.1:1/v1")
