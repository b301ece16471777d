"""A small server that answers `/v1/chat/completions` as a judge of two answers does."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PARTS = re.compile(r"-----reference answer\n(.*)\n-----answer of A\n(.*)\n-----answer of B\n(.*)\n-----", re.DOTALL)


def by_reference(question: str) -> str:
    """Prefers what the reference answer says."""
    found = PARTS.search(question)
    assert found
    target, first, second = found.groups()
    return (
        "One is right. [[C]]" if (first == target) == (second == target) else f"[[{'A' if first == target else 'B'}]]"
    )


@contextmanager
def judging(answer: Callable[[str], str] = by_reference, status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """A server on loopback: its URL, and the header Authorization and the body of each request."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.headers["Authorization"], body))
            assert self.path == "/v1/chat/completions"
            told = {"role": "assistant", "content": answer(body["messages"][0]["content"])}
            data = json.dumps({"choices": [{"index": 0, "message": told}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
