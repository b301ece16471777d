"""The receiver of the Hub's webhooks: a push to a repo that a recipe follows becomes the event that starts a merge.

    PREFECT_API_URL=http://127.0.0.1:4200/api python -m lewis_flows.service.webhook

It listens on loopback; a reverse proxy with TLS belongs before it. A delivery only says that something moved: the merge
asks the Hub itself what the newest commit is.
"""

import hmac
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lewis import store
from lewis.errors import InputError, LewisError
from lewis_flows import environment, recipes_folder
from lewis_flows.service.hub_payload import Delivery, UpdatedRef
from lewis_flows.service.release_event import announce, hub_repos

logger = logging.getLogger("lewis.webhook")

MAX_BODY = 1 << 20  # bytes; the Hub's deliveries have about two thousand
_REMEMBERED = 4096  # releases, so that a redelivery is known as one

Answer = tuple[int, dict[str, Any]]


class _Receiver:
    """What becomes of a delivery once its sender is known."""

    def __init__(self) -> None:
        self._taken: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._one_at_a_time = threading.Lock()  # two deliveries of one release at once must not both be the first

    def take(self, body: bytes) -> Answer:
        try:
            delivery = Delivery.model_validate_json(body)
        except ValidationError as error:
            # Field and kind of error only: the values are the sender's.
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            return 422, {"status": "refused", "why": f"not a webhook payload of the Hub: {where}: {first['type']}"}
        push = delivery.push()
        if isinstance(push, str):
            # 200, for the Hub turns a webhook off that often answers with an error.
            return 200, {"status": "ignored", "why": push}
        try:
            with self._one_at_a_time:
                return self._announce(delivery.repo.name, push)
        except LewisError as error:
            logger.error("%s", _printable(str(error)))
            return 503, {"status": "failed", "why": "the event could not be handed on; deliver it again"}

    def _announce(self, name: str, push: UpdatedRef) -> Answer:
        # The recipes are read anew: one that was dropped in since counts.
        followers = {
            recipe: (repo, ref)
            for recipe, content in recipes_folder.load_all().items()
            for repo, ref in hub_repos(content)
            if repo.lower() == name.lower()  # the Hub knows a repo in any case, its payload has the official one
        }
        if not followers:
            return 422, {"status": "refused", "why": "no recipe follows the main branch of this repo", "repo": name}
        new = str(push.newSha)
        release = (name, new)
        about = {"repo": name, "new": new, "recipes": sorted(followers)}
        if release in self._taken:
            self._taken.move_to_end(release)
            return 200, {"status": "duplicate", **about}
        events = [announce(recipe, ref, repo, push.oldSha, new) for recipe, (repo, ref) in sorted(followers.items())]
        self._taken[release] = None
        if len(self._taken) > _REMEMBERED:
            self._taken.popitem(last=False)
        return 202, {"status": "accepted", **about, "events": events}


def create_app(secret: str) -> FastAPI:
    """The receiver: `POST /webhook` for the Hub, `GET /health` for whoever watches it.

    Args:
        secret: what the Hub sends in `X-Webhook-Secret`.

    Raises:
        InputError: if the secret is empty.
    """
    if not secret:
        raise InputError("the webhook's secret is empty: anyone could start merges; set LEWIS_WEBHOOK_SECRET")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(_AccessLog, secret=secret)
    receiver = _Receiver()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/webhook")
    async def webhook(request: Request) -> Response:
        given = request.headers.get("x-webhook-secret", "").encode("latin-1")  # the bytes as they came
        if not hmac.compare_digest(given, secret.encode()):
            status, answer = 401, {"status": "refused", "why": "wrong or missing X-Webhook-Secret"}
        elif (body := await _read(request)) is None:
            status, answer = 413, {"status": "refused", "why": f"the body has more than {MAX_BODY} bytes"}
        else:
            status, answer = await run_in_threadpool(receiver.take, body)
        request.scope["lewis.answer"] = answer
        return JSONResponse(answer, status)

    return app


async def _read(request: Request) -> bytes | None:
    """The body, or None if it is too long: then the rest is not kept."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 9 or int(length) > MAX_BODY):
        return None
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return None
    except ClientDisconnect:
        return b""  # nobody is there to read the answer
    return bytes(body)


class _AccessLog:
    """One line for each request. What the sender chose is in it only if it is harmless, the secret never."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app, self._secret = app, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            path = scope["path"].replace(self._secret, "***")  # someone will try it as a part of the address
            client = (scope.get("client") or ["?"])[0]
            line = _printable(f"{client} {scope['method']} {path} {status} {' '.join(words)}".rstrip())
            level = logging.DEBUG if path == "/health" else logging.INFO if status < 400 else logging.WARNING
            logger.log(level, "%s (%.0f ms)", line, 1000 * (time.monotonic() - started))


def _printable(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)[:500]


def secret() -> str:
    """The secret that the Hub must send: `LEWIS_WEBHOOK_SECRET`, or the store's `webhook-secret`, made when missing.

    Raises:
        InputError: if others may read the file, or it is empty.
    """
    given = os.environ.get("LEWIS_WEBHOOK_SECRET", "").strip()
    if given:
        return given
    path = store.home() / "webhook-secret"
    with store.lock("webhook-secret"):
        if not path.exists():
            with store.written_beside(path) as beside:
                beside.touch(mode=0o600)
                beside.write_text(secrets.token_urlsafe(32) + "\n")
    if path.stat().st_mode & 0o077:
        raise InputError(f"{path}: others may read it: expected mode 0600; remove it, and tell the Hub the new secret")
    found = path.read_text().strip()
    if not found:
        raise InputError(f"{path}: it is empty; remove it, and tell the Hub the new secret")
    return found


def serve(host: str, port: int, secret: str) -> None:
    """Run the receiver until it is told to stop.

    Args:
        host, port: where to listen.
        secret: as for `create_app`.

    Raises:
        InputError: if the port is taken, or there is no Prefect server to tell.
    """
    import uvicorn
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL is not set: there is no server to tell of a release; start `lewis up`")
    app = create_app(secret)
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; set LEWIS_WEBHOOK_PORT") from error
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5)
    logger.info("listening on http://%s:%d/webhook", *listening.getsockname()[:2])
    uvicorn.Server(config).run(sockets=[listening])


def main() -> int:
    """`python -m lewis_flows.service.webhook`; the exit code is 2 if a setting is wrong."""
    environment.prepare()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    try:
        port = os.environ.get("LEWIS_WEBHOOK_PORT", "4300")
        if not port.isdecimal() or int(port) > 65535:
            raise InputError(f"LEWIS_WEBHOOK_PORT: expected a port, 0 to 65535, got {port!r}")
        with suppress(KeyboardInterrupt):
            serve(os.environ.get("LEWIS_WEBHOOK_HOST", "127.0.0.1"), int(port), secret())
    except InputError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
