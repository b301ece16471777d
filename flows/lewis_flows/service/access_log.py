"""The access log of the webhook receiver: one line for each request, without anything a sender could do harm with."""

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("lewis.webhook")


class AccessLog:
    """Middleware that logs each request with the answer that the endpoint left in the scope as `lewis.answer`.

    The secret never gets into the log, even if a sender puts it into the path.
    """

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app, self._secret = app, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer a request, then log it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, started = 500, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            answer = scope.get("lewis.answer", {})
            words = [str(answer[key]) for key in ("status", "repo", "new", "why") if key in answer]
            words += [f"for {', '.join(answer['recipes'])}"] if answer.get("recipes") else []
            path = scope["path"].replace(self._secret, "***")
            client = (scope.get("client") or ["?"])[0]
            line = printable(f"{client} {scope['method']} {path} {status} {' '.join(words)}".rstrip())
            quiet = path.startswith("/health") or (path == "/metrics" and status < 400)
            level = logging.DEBUG if quiet else logging.INFO if status < 400 else logging.WARNING
            logger.log(level, "%s (%.0f ms)", line, 1000 * (time.monotonic() - started))


def printable(text: str) -> str:
    """At most 500 characters of a text, with `?` for everything but printable ASCII."""
    return re.sub(r"[^ -~]", "?", text)[:500]
