"""A real HTTP server that notes what it is sent, and answers what it is told to."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    """A request, its body as it was sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)


class HttpSink:
    """Use as a context manager.

    Attributes:
        received: all requests.
        statuses: the answers to the next ones; when they are used up, 200.
        answer: gives what is answered to a request of status 200, as JSON.
    """

    def __init__(self, answer: Callable[[Request], Any] = lambda request: {}, port: int = 0) -> None:
        self.received: list[Request] = []
        self.statuses: list[int] = []
        self.answer = answer
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def _take(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, body)
                sink.received.append(request)
                status = sink.statuses.pop(0) if sink.statuses else 200
                content = sink.answer(request) if status == 200 else {"error": f"told to answer {status}"}
                if isinstance(content, tuple):
                    status, content = content
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _take

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HttpSink":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
