"""A Prefect server that takes events and dies before it stores them, as its clients see it."""

import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Forgetful:
    """Passes every request on to a real server, but those that bring events: it only says that it took them.

    Use it as a context manager; `url` is that of its API, `taken` how many such requests there were.
    """

    def __init__(self, api: str) -> None:
        self.taken = 0
        outer, real = self, api.removesuffix("/api")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if (self.command, self.path) == ("POST", "/api/events"):
                    outer.taken += 1
                    return self.answer(204, b"")
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                headers["Accept-Encoding"] = "identity"
                request = urllib.request.Request(real + self.path, body or None, headers, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=30) as found:
                        self.answer(found.status, found.read())
                except urllib.error.HTTPError as error:
                    self.answer(error.code, error.read())

            do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/api"

    def __enter__(self) -> "Forgetful":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
