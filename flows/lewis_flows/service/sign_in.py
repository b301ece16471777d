"""Sign a browser in at the Prefect server of `lewis up`, without copying its key.

`lewis open` makes a code from the key; the server accepts it once and within a minute. The browser reads the code from
a file that only its user can read, since all users can read the command line of a process.
"""

import hmac
import html
import json
import os
import secrets
import sys
import time
import webbrowser
from urllib.parse import parse_qs, quote, urlsplit

from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lewis import store
from lewis.store.secrets import PREFECT_KEY
from lewis_flows.service import note

PATH = "/lewis/sign-in"
_VALID = 60  # seconds
_PAGE = """<!doctype html><meta charset=utf-8><title>Signing in</title><script>
localStorage.setItem("prefect-password", btoa(%s)); location.replace(%s);
</script>"""
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'",
}


def make_code(key: str) -> str:
    """Return a code that signs a browser in once, within a minute."""
    head = f"{int(time.time()) + _VALID}.{secrets.token_hex(8)}"
    return f"{head}.{_seal(key, head)}"


def _seal(key: str, head: str) -> str:
    return hmac.new(key.encode(), f"{PATH} {head}".encode(), "sha256").hexdigest()


class SignIn:
    """Middleware that answers `GET /lewis/sign-in?code=...&to=/page`: it puts the key into the browser's storage."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key, self._used = app, key, dict[str, float]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._key or scope["type"] != "http" or scope["path"] != PATH:
            return await self._app(scope, receive, send)
        asked = {name: values[0] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        if scope["method"] != "GET" or not self._takes(asked.get("code", "")):
            return await PlainTextResponse("not a valid code; run `lewis open` again", 403)(scope, receive, send)
        to = asked.get("to", "/")
        to = to if to.startswith("/") and not to.startswith(("//", "/\\")) else "/"  # only to pages of this server
        page = _PAGE % tuple(json.dumps(text).replace("<", "\\u003c") for text in (self._key, to))
        await HTMLResponse(page, headers=_HEADERS)(scope, receive, send)

    def _takes(self, code: str) -> bool:
        head, _, seal = code.rpartition(".")
        until, now = head.partition(".")[0], time.time()
        if not hmac.compare_digest(seal.encode(), _seal(self._key, head).encode()) or not now < int(until):
            return False
        self._used = {each: end for each, end in self._used.items() if end > now}
        fresh = code not in self._used
        self._used[code] = float(until)
        return fresh


def open_signed_in(page: str) -> None:
    """Open a page in the user's browser, if there is one; signed in if the page is of `lewis up` on this store."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    server = str(note.read().get("prefect", "")).removesuffix("/api")
    ours = bool(server) and page.startswith(f"{server}/") and PREFECT_KEY.path().exists()
    if ours:
        parts = urlsplit(page)
        to = parts.path + (f"?{parts.query}" if parts.query else "")
        address = f"{server}{PATH}?code={make_code(PREFECT_KEY.read())}&to={quote(to)}"
        file = store.home() / "open.html"
        with store.written_beside(file, private=True) as beside:
            beside.write_text(f'<!doctype html><meta http-equiv=refresh content="0; url={html.escape(address)}">')
        page = file.as_uri()
    webbrowser.open(page)
