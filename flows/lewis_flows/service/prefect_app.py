"""Run Prefect's server, for requests that are sent to its own address, and not from pages of other sites.

    PREFECT_SERVER_API_AUTH_STRING=... PREFECT_SERVER_API_PORT=4200 python -m lewis_flows.service.prefect_app

Its own addresses are those in `PREFECT_SERVER_CORS_ALLOWED_ORIGINS`.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lewis import private_names
from lewis.quick_imports import quick_imports
from lewis_flows.service.own_pages import OwnPages, split_origins
from lewis_flows.service.sign_in import SignIn

DEAD_RUNS, DEAD_AFTER = "lewis-dead-runs", timedelta(seconds=90)
"""Name of the automation that marks runs as Crashed, and after how long without a heartbeat; one is sent every 30 s."""

LEASES = ("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "prefect.server.concurrency.lease_storage.filesystem")
"""Variable and default of where the server keeps leases: in its `PREFECT_HOME`; Prefect's own default is in memory.

A server that is started again still knows which tasks hold a device, and which runs have their recipe's turn.
"""

_AT_ONCE = 500  # events that one query asks for
_ALL = 1 << 20  # leases; without a number, the storage lists 100
_LONGEST = 1 << 20  # bytes of a query's body, which is read before the application has checked the key


class NewestFirst:
    """Middleware that sorts artifacts newest first if a query asks for no order, such as the query of a run's page.

    Prefect itself sorts them by their random ids. A run writes last the artifact that a person reads first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/api/artifacts/filter":
            return await self._app(scope, receive, send)
        messages, body = list[Message](), b""
        while len(body) <= _LONGEST:
            messages.append(message := await receive())
            body += message.get("body", b"")
            if not message.get("more_body"):
                with suppress(ValueError, TypeError):  # the application reports a body that is no object
                    body = json.dumps({"sort": "CREATED_DESC", **json.loads(body)}).encode()
                    messages = [{"type": "http.request", "body": body, "more_body": False}]
                break

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


def write_each_event_once() -> None:
    """Have Prefect's server write no event that is in the database already, and none twice.

    Clients send events again after they lost the connection. On SQLite, Prefect fails at a batch of known events alone,
    or with one event twice, tries it again with those that came meanwhile, and drops all after five attempts.
    """
    import sqlalchemy as sa
    from prefect.server.database import PrefectDBInterface, db_injector
    from prefect.server.events.schemas.events import ReceivedEvent
    from sqlalchemy.ext.asyncio import AsyncSession

    write = private_names.PREFECT_WRITE_EVENTS.get()

    @db_injector
    async def write_new(db: PrefectDBInterface, session: AsyncSession, events: list[ReceivedEvent]) -> None:
        by_id, known = {event.id: event for event in events}, set()
        for start in range(0, len(by_id), _AT_ONCE):
            ids = list(by_id)[start : start + _AT_ONCE]
            known |= set(await session.scalars(sa.select(db.Event.id).where(db.Event.id.in_(ids))))
        await write(session=session, events=[event for key, event in by_id.items() if key not in known])

    private_names.PREFECT_WRITE_EVENTS.put(write_new)


def free_leases_of_the_dead() -> None:
    """Guard Prefect's index of concurrency leases by a lock that the kernel frees as soon as its holder dies.

    Prefect's own lock is a file with a process id. After its server was killed, it counts as held for good if another
    process gets this id, as in a container that is started again. Then each request that ends a run waits for it,
    within a transaction that locks SQLite for all others.
    """
    from filelock import AsyncFileLock

    @asynccontextmanager
    async def guarded(storage: Any) -> AsyncIterator[None]:
        storage.storage_path.mkdir(parents=True, exist_ok=True)
        async with AsyncFileLock(storage.storage_path / "index.lock", run_in_executor=False):
            yield

    private_names.PREFECT_LEASE_INDEX.put(guarded)


async def recover() -> None:
    """Correct what the database says of the time while the server was down, before the server reads it."""
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    db = provide_database_interface()
    for correct in (_wait_again_for_heartbeats, _free_slots_without_lease):
        with suppress(
            sa.exc.DBAPIError, OSError
        ):  # before the first start there are no tables; the server reports any other error
            async with db.session_context(begin_transaction=True) as session:
                await correct(db, session)
    await (await db.engine()).dispose()  # of this event loop, which ends now


async def _wait_again_for_heartbeats(db: Any, session: Any) -> None:
    """Restart the deadline of each run's next heartbeat, as if the last one had come now.

    While the server was down, no heartbeat could reach it: it would mark runs that wait for its return as Crashed.
    """
    import sqlalchemy as sa

    ours = sa.select(db.Automation.id).where(db.Automation.name == DEAD_RUNS)
    waits = sa.update(db.AutomationBucket).where(db.AutomationBucket.automation_id.in_(ours))
    await session.execute(waits.values(end=datetime.now(UTC) + DEAD_AFTER))


async def _free_slots_without_lease(db: Any, session: Any) -> None:
    """Free the slots of `lewis-device` that have no lease: nothing else would, and tasks would wait for them for ever.

    A server that kept its leases in memory, or lost its `PREFECT_HOME`, has forgotten them; one that was killed while
    it gave a slot may have noted no lease.
    """
    import sqlalchemy as sa
    from prefect.server.concurrency.lease_storage import get_concurrency_lease_storage

    from lewis_tasks.support.device_slot import LIMIT

    of_device = db.ConcurrencyLimitV2.name == LIMIT
    if limit := await session.scalar(sa.select(db.ConcurrencyLimitV2.id).where(of_device)):
        leases = get_concurrency_lease_storage()
        # An expired lease still has its slots until the server takes them back, which it does for each such lease.
        ids = [*await leases.read_active_lease_ids(_ALL), *await leases.read_expired_lease_ids(_ALL)]
        known = [lease for each in ids if (lease := await leases.read_lease(each)) and limit in lease.resource_ids]
        held = sum(lease.metadata.slots for lease in known if lease.metadata)
        more = sa.update(db.ConcurrencyLimitV2).where(of_device, db.ConcurrencyLimitV2.active_slots > held)
        await session.execute(more.values(active_slots=held))


def main() -> None:
    """Serve as `prefect server start` does, with Prefect's own settings, but with leases on disk by default."""
    os.environ.setdefault(*LEASES)  # before Prefect is imported, which reads its settings
    with quick_imports():
        import uvicorn
        from prefect.logging.configuration import setup_logging
        from prefect.server.api.server import create_app
        from prefect.settings import get_current_settings

    setup_logging()
    server = get_current_settings().server
    if not server.ui.v2_enabled:
        # Its pages call a tracking host, whatever the settings say; a bundle that is not there is not served.
        private_names.PREFECT_UI_V2.put(Path(os.devnull) / "none")
    url = server.database.connection_url
    if private_names.PREFECT_WRITE_EVENTS.applies() and url and url.get_secret_value().startswith("sqlite"):
        write_each_event_once()
    free_leases_of_the_dead()
    asyncio.run(recover())
    key = server.api.auth_string.get_secret_value() if server.api.auth_string else ""
    origins = split_origins(server.api.cors_allowed_origins)
    uvicorn.run(
        OwnPages(SignIn(NewestFirst(create_app(final=True)), key), origins),
        host=server.api.host,
        port=server.api.port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
        timeout_graceful_shutdown=5,  # seconds; else a page that is left open would keep it from ending
    )


if __name__ == "__main__":
    main()
