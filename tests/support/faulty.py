"""A server before a real one: it passes every request on, but for one, which fails as its clients may see it fail."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOWS = ("500 before", "500 after", "no answer", "late")
"""How a request fails: it is refused; or it is done, and the answer is an error, or there is none; or it is done once
its client has given up."""
TRIES = 3  # of a request, by MLflow's client with the two repetitions that LEWIS sets


class Faulty:
    """Passes every request on to a real server, but for one.

    Use it as a context manager; `url` is its address, `paths` what was asked for since `fail`.

    Args:
        real: address of the server.
        patience: after how many seconds its clients have given up.
    """

    def __init__(self, real: str, patience: float) -> None:
        self.paths = list[str]()
        self._how, self._where, self._left = "", 0, 0
        self._failing: tuple[str, str, bytes] | None = None
        self._guard, self._idle, self._busy = threading.Lock(), threading.Condition(), 0
        outer, place = self, urlsplit(real)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with outer._idle:
                    outer._busy += 1
                try:
                    self._handle()
                except OSError:  # the client has given up
                    pass
                finally:
                    with outer._idle:
                        outer._busy -= 1
                        outer._idle.notify_all()

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                how = outer._fails((str(self.command), self.path, body))
                if how == "500 before":
                    return self._answer(500, "text/plain", b"no")
                if how == "late":
                    threading.Event().wait(patience)
                found = self._real(body)
                if how == "no answer":
                    threading.Event().wait(patience)
                elif how == "500 after":
                    self._answer(500, "text/plain", b"no")
                elif how != "late":
                    self._answer(*found)

            do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

            def _real(self, body: bytes) -> tuple[int, str, bytes]:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                headers["Accept-Encoding"] = "identity"
                server = http.client.HTTPConnection(place.netloc, timeout=120)
                try:
                    server.request(str(self.command), self.path, body or None, headers)
                    answer = server.getresponse()
                    return answer.status, answer.headers.get("content-type", ""), answer.read()
                finally:
                    server.close()

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

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

    def __enter__(self) -> "Faulty":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
