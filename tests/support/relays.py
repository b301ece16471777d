"""Servers before a real one: they pass requests on, but for some, which fail as their clients may see them fail."""

import http.client
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

HOWS = ("500 before", "500 after", "no answer", "late")
"""How a request fails: it is refused; or it is done, and the answer is an error, or there is none; or it is done once
its client has given up."""
TRIES = 3  # of a request, by MLflow's client with the two repetitions that LEWIS sets
Answer = tuple[int, str, bytes]  # status, content type, body


class Relay(BaseHTTPRequestHandler):
    """Answers requests in place of the server at `place`, which is a host and a port."""

    place = ""

    def do_GET(self) -> None:
        with suppress(OSError):  # the client has given up
            self.handle_one(self.rfile.read(int(self.headers.get("content-length") or 0)))

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

    def handle_one(self, body: bytes) -> None:
        """Answer a request, or not."""
        raise NotImplementedError

    def real(self, body: bytes) -> Answer:
        """What the real server answers."""
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        headers["Accept-Encoding"] = "identity"
        server = http.client.HTTPConnection(self.place, timeout=120)
        try:
            server.request(str(self.command), self.path, body or None, headers)
            answer = server.getresponse()
            return answer.status, answer.headers.get("content-type", ""), answer.read()
        finally:
            server.close()

    def answer(self, status: int, kind: str, body: bytes) -> None:
        """Answer the client."""
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Served:
    """Serves a relay while a `with` block lasts; `url` is its address."""

    def __init__(self, real: str, relay: type[Relay]) -> None:
        relay.place = urlsplit(real).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), relay)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Forgetful(_Served):
    """A Prefect server that takes events and dies before it stores them: it only says that it took them.

    `url` is that of its API, `taken` how many requests brought events.
    """

    def __init__(self, api: str) -> None:
        self.taken, outer = 0, self

        class Handler(Relay):
            def handle_one(self, body: bytes) -> None:
                if (self.command, self.path) == ("POST", "/api/events"):
                    outer.taken += 1
                    self.answer(204, "application/json", b"")
                else:
                    self.answer(*self.real(body))

        super().__init__(api, Handler)
        self.url += "/api"


class Faulty(_Served):
    """Passes every request on but for one; `paths` is what was asked for since `fail`.

    Args:
        real: address of the server.
        patience: after how many seconds its clients have given up.
    """

    def __init__(self, real: str, patience: float) -> None:
        self.paths = list[str]()
        self._how, self._where, self._left = "", 0, 0
        self._failing: tuple[str, str, bytes] | None = None
        self._guard, self._idle, self._busy = threading.Lock(), threading.Condition(), 0
        outer = self

        class Handler(Relay):
            def do_GET(self) -> None:
                with outer._idle:
                    outer._busy += 1
                try:
                    super().do_GET()
                finally:
                    with outer._idle:
                        outer._busy -= 1
                        outer._idle.notify_all()

            do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

            def handle_one(self, body: bytes) -> None:
                how = outer._fails((str(self.command), self.path, body))
                if how == "500 before":
                    return self.answer(500, "text/plain", b"no")
                if how == "late":
                    threading.Event().wait(patience)
                found = self.real(body)
                if how == "no answer":
                    threading.Event().wait(patience)
                elif how == "500 after":
                    self.answer(500, "text/plain", b"no")
                elif how != "late":
                    self.answer(*found)

        super().__init__(real, Handler)

    def fail(self, how: str, where: int, times: int) -> None:
        """Let a request fail from now on, and count requests from then on.

        Args:
            how: one of `HOWS`, or empty: none fails.
            where: the number of the request, from 1.
            times: how often it fails; its client may send it again.
        """
        with self._guard:
            self.paths, self._failing = [], None
            self._how, self._where, self._left = how, where, times

    def wait(self) -> None:
        """Wait until the server has done all that it was asked for."""
        with self._idle:
            assert self._idle.wait_for(lambda: not self._busy, 300)

    def _fails(self, request: tuple[str, str, bytes]) -> str:
        with self._guard:
            self.paths.append(request[1])
            if len(self.paths) == self._where:
                self._failing = request
            if request != self._failing or not self._left:
                return ""
            self._left -= 1
            return self._how
