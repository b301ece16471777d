"""The receiver of the Hub's webhooks: it turns a push to a repo that a recipe follows into the event of a release.

    PREFECT_API_URL=http://127.0.0.1:4200/api python -m lewis_flows.service.webhook

It listens on loopback; put a reverse proxy with TLS before it. A delivery only says that something moved: the merge
asks the Hub for the newest commit.
"""

import hmac
import logging
import os
import socket
import sys
from contextlib import suppress

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import ClientDisconnect

from lewis.errors import InputError
from lewis_flows import environment, json_logs, secret_blocks
from lewis_flows.service import api_key, mlflow_key, webhook_secret
from lewis_flows.service.access_log import AccessLog
from lewis_flows.service.metrics.page import Page, default_sources, metrics_key
from lewis_flows.service.receiver import Readiness, Receiver

logger = logging.getLogger("lewis.webhook")

MAX_BODY = 1 << 20  # bytes; a delivery of the Hub has about two thousand


def create_app(secret: str, key: str = "", page: Page | None = None) -> FastAPI:
    """The receiver as a web application: `POST /webhook` for the Hub, and for whoever watches it:

    `GET /health/live`, or `/health`, answers 200 while the process does; `GET /health/ready` answers 200 if a delivery
    can be handed on, else 503 with what is `missing`. `GET /metrics` has numbers for Prometheus.

    Args:
        secret: what the Hub sends in `X-Webhook-Secret`.
        key: what a scraper sends in `Authorization: Bearer`; without one, nobody gets the metrics.
        page: of the metrics; by default one of Prefect, the registry and the store.

    Raises:
        InputError: if the secret is empty.
    """
    if not secret:
        raise InputError("the webhook's secret is empty: anyone could start merges; set LEWIS_WEBHOOK_SECRET")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(AccessLog, secret=secret)
    receiver = Receiver()

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


async def _read(request: Request) -> bytes | None:
    """The body, or None if it is too long; then the rest is not read into memory."""
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


def serve(host: str, port: int, secret: str) -> None:
    """Run the receiver until it is told to stop.

    Args:
        host, port: where to listen.
        secret: as for `create_app`.

    Raises:
        InputError: if the port is taken.
    """
    import uvicorn

    app = create_app(secret, metrics_key())
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; set LEWIS_WEBHOOK_PORT") from error
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5)
    logger.info("listening on http://%s:%d/webhook", *listening.getsockname()[:2])
    uvicorn.Server(config).run(sockets=[listening])


def _secret() -> str:
    """The secret of the environment or of the store; else that of Prefect's block; else a new one, which is kept.

    Raises:
        InputError: if Prefect, which may have it, does not answer, or as `webhook_secret.webhook_secret`.
    """
    if not os.environ.get("LEWIS_WEBHOOK_SECRET") and not webhook_secret.path().exists():
        from httpx import HTTPError

        try:
            secret_blocks.load_for_receiver()
        except HTTPError as error:
            raise InputError(
                f"the Prefect server, which may have the secret, does not answer ({type(error).__name__}); start it "
                "first, or set LEWIS_WEBHOOK_SECRET"
            ) from None
    return webhook_secret.webhook_secret()


def _check_server() -> None:
    """Raise InputError unless a Prefect server is named: without one, Prefect's client would start its own."""
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL is not set: there is no server to tell of a release; start `lewis up`")


def main() -> int:
    """`python -m lewis_flows.service.webhook`; the exit code is 2 if a setting is wrong."""
    try:
        environment.prepare()
        handlers = [json_logs.JsonLines()] if json_logs.is_json() else None
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, handlers=handlers)
        logger.setLevel(logging.INFO)
        api_key.find()
        mlflow_key.find()
        port = os.environ.get("LEWIS_WEBHOOK_PORT", "4300")
        if not port.isdecimal() or int(port) > 65535:
            raise InputError(f"LEWIS_WEBHOOK_PORT: expected a port, 0 to 65535, got {port!r}")
        _check_server()
        with suppress(KeyboardInterrupt):
            serve(os.environ.get("LEWIS_WEBHOOK_HOST", "127.0.0.1"), int(port), _secret())
    except InputError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
