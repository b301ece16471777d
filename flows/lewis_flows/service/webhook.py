"""The long-running process of the service: it receives the Hub's webhooks, polls the Hub and deploys the recipes.

A push to a repo that a recipe follows is announced to Prefect, as the event of a release.

    PREFECT_API_URL=http://127.0.0.1:4200/api python -m lewis_flows.service.webhook

It listens on loopback by default; put a reverse proxy with TLS in front of it. A delivery only says that a branch
moved: the merge asks the Hub for the newest commit.
"""

import asyncio
import hmac
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lewis import settings
from lewis.errors import InputError, LewisError
from lewis.redact import printable
from lewis.registry import outbox, tracking
from lewis.store.secrets import METRICS_KEY, WEBHOOK_SECRET
from lewis_flows import environment, json_logs, secret_blocks, turn, watch
from lewis_flows.service import credentials, keep_served, orphaned_runs, recipes_page
from lewis_flows.service.deploy import Follower
from lewis_flows.service.metrics.page import Page, default_sources
from lewis_flows.service.receiver import Readiness, Receiver
from lewis_tasks.support import events

logger = logging.getLogger("lewis.webhook")

FOLLOW = 5.0  # seconds between two checks of the folder of recipes
MAX_SECONDS = 10.0  # from the first byte of a request to its last, or from a connection to its first byte
MAX_BODY = 1 << 20  # bytes; a delivery of the Hub has about two thousand


def create_app(
    secret: str, key: str = "", page: Page | None = None, deploy: Callable[[], object] | None = None
) -> FastAPI:
    """Create the web application of the receiver: `POST /webhook` for the Hub, and endpoints for monitoring.

    `GET /health/live`, or `/health`, answers 200 while the process runs; `GET /health/ready` answers 200 if a delivery
    can be passed on to Prefect, else 503 with what is `missing`. `GET /metrics` gives the metrics to Prometheus.

    Args:
        secret: what the Hub has to send in `X-Webhook-Secret`.
        key: what a scraper has to send in `Authorization: Bearer`; if it is empty, nobody gets the metrics.
        page: the page of metrics; by default, one of `default_sources`.
        deploy: as for `Receiver`.

    Raises:
        InputError: if the secret is empty.
    """
    if not secret:
        raise InputError("the webhook's secret is empty: anyone could start merges; set LEWIS_WEBHOOK_SECRET")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(_AccessLog, secret=secret)
    receiver = Receiver(deploy)

    readiness, page = Readiness(), page or Page(default_sources())

    @app.get("/health")
    @app.get("/health/live")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> Response:
        missing = await run_in_threadpool(readiness.missing)
        status = "not ready" if missing else "ready"
        return JSONResponse({"status": status, "missing": missing}, 503 if missing else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not key or not hmac.compare_digest(given, f"Bearer {key}".encode()):
            answer = {"status": "refused", "why": "wrong or missing key: Authorization: Bearer <metrics-key>"}
            request.scope["lewis.answer"] = answer
            return JSONResponse(answer, 401, {"WWW-Authenticate": "Bearer"})
        return Response(await run_in_threadpool(page.text), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.post("/webhook")
    async def webhook(request: Request) -> Response:
        given = request.headers.get("x-webhook-secret", "").encode("latin-1")  # as sent
        if not hmac.compare_digest(given, secret.encode()):
            status, answer = 401, {"status": "refused", "why": "wrong or missing X-Webhook-Secret"}
        elif (body := await _read(request)) is None:
            status, answer = 413, {"status": "refused", "why": f"the body has more than {MAX_BODY} bytes"}
        else:
            status, answer = await run_in_threadpool(receiver.take, body)
        request.scope["lewis.answer"] = answer
        return JSONResponse(answer, status)

    return app


class _AccessLog:
    """Middleware that logs each request with the answer that the endpoint left in the scope as `lewis.answer`.

    The secret never gets into the log, even if a sender puts it into the path.
    """

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
            path = scope["path"].replace(self._secret, "***")
            client = (scope.get("client") or ["?"])[0]
            line = printable(f"{client} {scope['method']} {path} {status} {' '.join(words)}".rstrip())
            quiet = path.startswith("/health") or (path == "/metrics" and status < 400)
            level = logging.DEBUG if quiet else logging.INFO if status < 400 else logging.WARNING
            logger.log(level, "%s (%.0f ms)", line, 1000 * (time.monotonic() - started))


async def _read(request: Request) -> bytes | None:
    """Return the body of a request; None if it is longer than `MAX_BODY`: the rest is not read into memory."""
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
        return b""  # the client has gone
    return bytes(body)


def _impatient() -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with the limit `MAX_SECONDS`; without it, uvicorn waits for requests endlessly."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._begun = False
            self._look = self.loop.call_later(MAX_SECONDS, self._close_if_not_whole, transport)

        def data_received(self, data: bytes) -> None:
            if not self._begun or self._is_idle():
                self._begun = True
                self._look_later(self.transport)
            super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            self._look.cancel()
            super().connection_lost(exc)

        def _is_idle(self) -> bool:
            """Whether the connection is kept open for a further request; uvicorn closes it if none comes."""
            return self.timeout_keep_alive_task is not None

        def _look_later(self, transport: asyncio.Transport) -> None:
            self._look.cancel()
            self._look = self.loop.call_later(MAX_SECONDS, self._close_if_not_whole, transport)

        def _close_if_not_whole(self, transport: asyncio.Transport) -> None:
            """Close the connection, unless it is idle, or a complete request is being answered."""
            if self._is_idle():
                return
            if self.cycle is None or self.cycle.more_body or self.cycle.response_complete:
                return transport.abort()
            self._look_later(transport)

    return Impatient


class _Look:
    """Deploys recipes that changed; updates the page of all recipes then, or if a champion moved on this store."""

    def __init__(self, follower: Follower) -> None:
        self._follower, self._moved = follower, set[str]()

    def __call__(self) -> None:
        """Deploy the recipes if their folder has changed, and update the page of all recipes if necessary."""
        deployed, moved = self._follower.follow(), {move.id for move in outbox.moves() if move.happened}
        if deployed or not moved <= self._moved:
            recipes_page.keep()
        self._moved = moved


def _poll(look: Callable[[], object]) -> None:
    """Poll all recipes, and update their page if the poll found a change.

    A recipe that was just added is deployed first: without its deployment, an announced release starts no merge.
    """
    look()
    if watch.poll_once():
        recipes_page.keep()


def serve(host: str, port: int, secret: str) -> None:
    """Run the receiver and the periodic jobs of the service until a signal to stop; `secret`: as for `create_app`.

    Raises:
        InputError: if the port is taken.
    """
    import uvicorn

    follower = Follower(logger.info)
    # Metrics have a key of their own, so that a scraper holds no secret that gives access to more.
    app = create_app(secret, METRICS_KEY.read(), deploy=follower.follow)
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; set LEWIS_WEBHOOK_PORT") from error
    config = uvicorn.Config(
        app,
        http=_impatient(),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    look = _Look(follower)
    loops = [
        Loop("recipes", look, FOLLOW),
        Loop("poll", lambda: _poll(look), settings.POLL_SECONDS.get()),
        Loop("served", keep_served.look, keep_served.EVERY),
        Loop("turns", turn.absorb_waiting, turn.EVERY),
        Loop("workers", orphaned_runs.DeadWorkers().look, orphaned_runs.EVERY),
    ]
    logger.info("listening on http://%s:%d/webhook", *listening.getsockname()[:2])
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for loop in loops:
            loop.stop()


class Loop:
    """A thread that calls a function periodically until it is stopped."""

    def __init__(self, name: str, do: Callable[[], object], pause: float) -> None:
        """Start a thread `name` that calls `do` with `pause` seconds between two calls (0: never), and logs errors."""
        self._do, self._pause, self._over = do, pause, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the loop; returns immediately, even while a call is running."""
        self._over.set()

    def _run(self) -> None:
        before = ""
        while self._pause and not self._over.is_set():
            try:
                self._do()
                before = ""
            except Exception as error:  # the next call tries again
                if (now := f"{type(error).__name__}: {error}") != before:
                    known = isinstance(error, LewisError)  # its message says all
                    logger.warning("%s: %s", self._thread.name, now, exc_info=None if known else error)
                before = now
            self._over.wait(self._pause)


def _secret() -> str:
    """Return the webhook's secret of the environment, the store or Prefect's block; else make and store a new one.

    Raise InputError if Prefect, which may have the secret, does not answer, or as `Secret.read` does.
    """
    if not settings.WEBHOOK_SECRET.get() and not WEBHOOK_SECRET.path().exists():
        from httpx import HTTPError

        try:
            secret_blocks.load_for_receiver()
        except HTTPError as error:
            raise InputError(
                f"the Prefect server, which may have the secret, does not answer ({type(error).__name__}); start it "
                "first, or set LEWIS_WEBHOOK_SECRET"
            ) from None
    return WEBHOOK_SECRET.read()


def main() -> int:
    """Run `python -m lewis_flows.service.webhook`; return the exit code, which is 2 if a setting is wrong."""
    try:
        environment.prepare()
        tracking.without_tables()
        handlers = [json_logs.JsonLines()] if json_logs.is_json() else None
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, handlers=handlers, force=True)
        logger.setLevel(logging.INFO)
        credentials.find()
        host, port = settings.WEBHOOK_HOST.get(), settings.WEBHOOK_PORT.get()
        events.check_server()
        with suppress(KeyboardInterrupt):
            serve(host, port, _secret())
    except InputError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
