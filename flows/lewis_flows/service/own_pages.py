"""Middleware that protects a local web server from requests that pages of other sites send through a browser.

Passwords and CORS, which Prefect and MLflow have, keep a page of another site from reading answers, but not from
sending requests. If the host name of that site resolves to 127.0.0.1 (DNS rebinding), the browser takes the server for
the page's own. A page on another port of this machine counts as a page of another site too.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class OwnPages:
    """Middleware that refuses requests to other hosts (400), and those from pages of other sites (403).

    It also forbids other sites to show the server's pages in a frame, where a user could be led to click on them.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        """Wrap an application whose own pages have `origins`, such as `http://127.0.0.1:4200`; `*` allows all."""
        hosts = [urlsplit(origin).hostname or origin for origin in origins]
        self._app, self._origins = TrustedHostMiddleware(app, hosts, www_redirect=False), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:

        async def send_unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Frame-Options", "SAMEORIGIN")
                headers.append("Content-Security-Policy", "frame-ancestors 'self'")
            await send(message)

        if scope["type"] in ("http", "websocket") and "*" not in self._origins:
            origin = Headers(scope=scope).get("origin")
            if origin is not None and origin not in self._origins:
                refusal = PlainTextResponse("pages of other sites may not use this server", 403)
                return await refusal(scope, receive, send_unframed)
        await self._app(scope, receive, send_unframed)


def own_origins(port: int) -> list[str]:
    """Return the origins of the pages of a server that listens on a port of loopback."""
    return [f"http://{host}:{port}" for host in ("127.0.0.1", "localhost")]


def split_origins(text: str) -> list[str]:
    """Split a comma-separated list of origins, the form in which the settings of Prefect and MLflow name them."""
    return [origin.strip() for origin in text.split(",") if origin.strip()]
