"""Who may use the Prefect server that is started here: anyone who has its key, and no page of another site."""

import asyncio
import http.client
import json
import logging
import os
import socket
import sqlite3
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
import sqlalchemy as sa
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, WorkPoolCreate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.server.database import provide_database_interface
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from lewis.errors import InputError
from lewis.store.secrets import PREFECT_KEY
from lewis_flows.service import deploy, note, prefect_app, prefect_log
from lewis_flows.service.credentials import PREFECT_SENT, connected, key_for
from tests.support.databases import put_prefect
from tests.support.prefect_key import KEY, credentials

EVIL = "http://evil.example"


@pytest.fixture
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        yield client


def ask(url: str, path: str, method: str = "GET", body: Any = None, **headers: str) -> http.client.HTTPResponse:
    """One request, with headers as given: `Host` too."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, json.dumps(body) if body is not None else None, named)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


def test_the_page_of_a_run_shows_its_newest_artifacts_first(client: SyncPrefectClient, prefect_url: str) -> None:
    keys = [f"artifact-{n}" for n in range(8)]
    for key in keys:
        client.create_artifact(ArtifactCreate(key=key, type="markdown", data=key))
    wanted, head = {"artifacts": {"key": {"any_": keys}}}, {"Content-Type": "application/json", **credentials()}

    def order(body: Any) -> list[str]:
        request = urllib.request.Request(f"{prefect_url}/artifacts/filter", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [each["key"] for each in json.load(answer)]

    assert order(wanted) == keys[::-1] and order({**wanted, "sort": "KEY_ASC"}) == keys
    with pytest.raises(urllib.error.HTTPError, match="422"):
        order(["no object"])


def test_the_key_is_asked_for_before_a_long_body_is_read(prefect_url: str) -> None:
    """The server kept all of it in memory, for somebody without the key. Of this one, no more than 1 MiB comes."""
    parts, piece = urlsplit(prefect_url), b"[" * (1 << 16)
    head = f"POST /api/artifacts/filter HTTP/1.1\r\nHost: {parts.netloc}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((str(parts.hostname), parts.port), timeout=60) as connection:
        connection.sendall(head.encode())
        for chunk in [piece] * 16 + [b"["]:
            connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        assert connection.recv(100).split()[1] == b"401"


def test_the_api_asks_for_the_key(prefect_url: str) -> None:
    filter_runs = ("/api/flow_runs/filter", "POST", {})
    assert ask(prefect_url, *filter_runs, Content_Type="application/json").status == 401
    assert ask(prefect_url, *filter_runs).status == 401  # a request that a page may send without asking first
    wrong = credentials(KEY + "x")
    assert ask(prefect_url, *filter_runs, Content_Type="application/json", **wrong).status == 401
    assert ask(prefect_url, *filter_runs, Content_Type="application/json", **credentials()).status == 200
    assert ask(prefect_url, "/api/health").status == 200  # which tells nothing


def test_events_that_are_there_already_hold_no_others_up(
    common: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clients send them that lost the connection: Prefect by itself fails, and in the end drops all that wait."""
    from prefect.server.events.services import event_persister

    def event(number: int) -> ReceivedEvent:
        resource = {"prefect.resource.id": f"{number}"}
        return ReceivedEvent(event="lewis.test", resource=resource, id=UUID(int=number), occurred=datetime.now(UTC))

    async def write(*numbers: int) -> None:
        async with provide_database_interface().session_context(begin_transaction=True) as session:
            await event_persister.write_events(session=session, events=[event(number) for number in numbers])

    async def kept() -> int:
        async with provide_database_interface().session_context() as session:
            return len((await session.scalars(sa.select(provide_database_interface().Event.id))).all())

    async def again() -> int:
        await write(1)
        with pytest.raises(sa.exc.IntegrityError):
            await write(1)
        prefect_app.write_each_event_once()
        await write(1)
        await write(1, 2, 2)
        return await kept()

    put_prefect(common, tmp_path)
    monkeypatch.setattr(event_persister, "write_events", event_persister.write_events)
    database = next(tmp_path.rglob("prefect.db"))
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{database}"}):
        assert asyncio.run(again()) == 2


def test_a_server_that_was_away_waits_again_for_heartbeats(common: Path, tmp_path: Path) -> None:
    """Else the first thing that it does is to mark the runs as Crashed that wait for its return."""
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import temporary_database_config
    from prefect.server.events.actions import DoNothing
    from prefect.server.events.models.automations import create_automation
    from prefect.server.events.schemas.automations import Automation, EventTrigger, Posture

    before = datetime(2026, 1, 1, tzinfo=UTC)

    async def ends() -> dict[str, datetime]:
        db = provide_database_interface()
        async with db.session_context() as session:
            found = await session.execute(sa.select(db.AutomationBucket.bucketing_key, db.AutomationBucket.end))
            return {key[0]: end for key, end in found}

    async def away() -> dict[str, datetime]:
        db = provide_database_interface()
        async with db.session_context(begin_transaction=True) as session:
            for name in (prefect_app.DEAD_RUNS, "release of tiny"):
                trigger = EventTrigger(posture=Posture.Reactive, threshold=1, within=timedelta(0))
                made = await create_automation(session, Automation(name=name, trigger=trigger, actions=[DoNothing()]))
                key, times = [f"a run of {name}"], {"start": before, "end": before, "count": 0}
                session.add(db.AutomationBucket(automation_id=made.id, trigger_id=made.id, bucketing_key=key, **times))
        return await ends()

    put_prefect(common, tmp_path)
    database, began = next(tmp_path.rglob("prefect.db")), datetime.now(UTC)
    with temporary_database_config(AioSqliteConfiguration(f"sqlite+aiosqlite:///{database}")):
        assert set(asyncio.run(away()).values()) == {before}
        asyncio.run(prefect_app.recover())
        live, release = asyncio.run(ends()).values()
        assert live >= began + prefect_app.DEAD_AFTER and release == before
    with temporary_database_config(AioSqliteConfiguration(f"sqlite+aiosqlite:///{tmp_path}/new.db")):  # has no tables
        asyncio.run(prefect_app.recover())


def test_leases_are_on_disk_however_the_server_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Prefect's memory they were lost at each restart of a container, and their device slots stayed taken."""
    variable, on_disk = prefect_app.LEASES

    def imports() -> None:
        raise InterruptedError(os.environ[variable])

    monkeypatch.setattr(prefect_app, "quick_imports", imports)  # what comes next imports Prefect
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    with pytest.raises(InterruptedError, match=f"^{on_disk}$"):
        prefect_app.main()
    monkeypatch.setenv(variable, "prefect_redis")
    with pytest.raises(InterruptedError, match="prefect_redis"):
        prefect_app.main()


def test_a_device_slot_without_a_lease_is_free_when_the_server_starts(
    common: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of live and of expired leases stay taken, and those of other limits."""
    from prefect.server.concurrency import lease_storage
    from prefect.server.concurrency.lease_storage.filesystem import ConcurrencyLeaseStorage
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import temporary_database_config

    leases = ConcurrencyLeaseStorage(tmp_path / "leases")
    monkeypatch.setattr(lease_storage, "get_concurrency_lease_storage", lambda: leases)

    async def takes(*seconds: int) -> list[UUID]:
        """Take three slots of each limit, and make leases of one slot that end after so many seconds."""
        db = provide_database_interface()
        async with db.session_context(begin_transaction=True) as session:
            made = [db.ConcurrencyLimitV2(name=name, limit=3, active_slots=3) for name in ("lewis-device", "other")]
            session.add_all(made)
            await session.flush()
        of = lease_storage.ConcurrencyLimitLeaseMetadata(slots=1)
        limits = [made[0].id, made[0].id, made[1].id]
        return [
            (await leases.create_lease([limit], timedelta(seconds=each), of)).id
            for limit, each in zip(limits, seconds, strict=True)
        ]

    async def taken() -> list[int]:
        db = provide_database_interface()
        async with db.session_context() as session:
            column = db.ConcurrencyLimitV2.active_slots
            return list(await session.scalars(sa.select(column).order_by(db.ConcurrencyLimitV2.name)))

    put_prefect(common, tmp_path)
    with temporary_database_config(AioSqliteConfiguration(f"sqlite+aiosqlite:///{tmp_path}/prefect/prefect.db")):
        live, expired, _ = asyncio.run(takes(60, -60, 60))
        for lost, left in ((None, 2), (expired, 1), (live, 0)):
            if lost:
                asyncio.run(leases.revoke_lease(lost))
            asyncio.run(prefect_app.recover())
            assert asyncio.run(taken()) == [left, 3]


def test_the_lock_of_a_killed_server_on_the_index_of_leases_holds_no_other_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do those that write at the same time undo what another wrote."""
    from prefect.server.concurrency.lease_storage.filesystem import ConcurrencyLeaseStorage

    async def lease() -> set[UUID]:
        made = [ConcurrencyLeaseStorage(tmp_path).create_lease([UUID(int=1)], timedelta(days=1)) for _ in range(20)]
        ids = {each.id for each in await asyncio.wait_for(asyncio.gather(*made), 300)}
        assert set(await ConcurrencyLeaseStorage(tmp_path).read_active_lease_ids()) == ids
        return ids

    monkeypatch.setattr(ConcurrencyLeaseStorage, "_lock_expiration_index", None)  # and put back at the end
    prefect_app.free_leases_of_the_dead()
    (tmp_path / "expirations.lock").write_text(str(os.getpid()))  # this process got the number of the killed server
    assert len(asyncio.run(lease())) == 20


@pytest.mark.parametrize("path", ["/api/health", "/api/admin/version", "/", "/ui-settings"])
def test_a_name_that_is_not_its_own_is_refused(prefect_url: str, path: str) -> None:
    """As a page of evil.example sees it when that name leads to 127.0.0.1."""
    assert ask(prefect_url, path, Host="evil.example", **credentials()).status == 400
    assert ask(prefect_url, path, Host=f"localhost:{urlsplit(prefect_url).port}", **credentials()).status == 200


def test_the_second_ui_which_calls_a_tracking_host_is_not_offered(prefect_url: str) -> None:
    with urllib.request.urlopen(f"{prefect_url.removesuffix('/api')}/ui-settings", timeout=60) as answer:
        settings = json.load(answer)
    assert (settings["default_ui"], settings["available_uis"], settings["v2_base_url"]) == ("v1", ["v1"], None)


def test_pages_of_other_sites_are_refused(prefect_url: str) -> None:
    for origin in (EVIL, "null", f"http://127.0.0.1:{urlsplit(prefect_url).port}.evil.example", "http://127.0.0.1:1"):
        headers = {"Origin": origin, "Content_Type": "application/json", **credentials()}
        assert ask(prefect_url, "/api/flow_runs/filter", "POST", {}, **headers).status == 403
        asked = {"Origin": origin, "Access_Control_Request_Method": "POST"}
        answer = ask(prefect_url, "/api/flow_runs/filter", "OPTIONS", **asked)
        assert answer.status == 403 and answer.getheader("access-control-allow-origin") is None
    own = prefect_url.removesuffix("/api").replace("127.0.0.1", "localhost")
    answer = ask(prefect_url, "/api/flow_runs/filter", "POST", {}, **{**headers, "Origin": own})
    assert answer.status == 200 and answer.getheader("access-control-allow-origin") == own


def test_sockets_of_other_sites_are_refused(prefect_url: str) -> None:
    address = (urlsplit(prefect_url).hostname, urlsplit(prefect_url).port)
    head = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: prefect\r\n"
    for more, status in ((f"Host: 127.0.0.1\r\nOrigin: {EVIL}", b"403"), ("Host: evil.example", b"400")):
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(f"GET /api/events/out HTTP/1.1\r\n{more}\r\n{head}\r\n".encode())
            assert connection.recv(100).split()[1] == status


def test_a_run_chooses_nothing_of_its_process(client: SyncPrefectClient) -> None:
    """Of an older pool with Prefect's own template, and of a deployment that uses it."""
    template = ProcessWorker.get_default_base_job_template()
    client.create_work_pool(WorkPoolCreate(name=deploy.POOL, type="process", base_job_template=template))
    try:
        flow = client.create_flow_from_name("merge")
        made = {"name": "access", "work_pool_name": deploy.POOL, "job_variables": {"env": {"A": "1"}}}
        before = client.create_deployment(flow, **made)
        for _ in range(2):
            deploy._put_pool(client, deploy.POOL)
        pool = client.read_work_pool(deploy.POOL)
        assert pool.base_job_template == deploy.TEMPLATE
        assert client.create_deployment(flow, **{**made, "job_variables": {}}) == before
        assert client.read_deployment(before).job_variables == {}
        client.create_flow_run_from_deployment(before)
        wanted: dict[str, Any] = {"command": "touch /tmp/evil", "env": {"LD_PRELOAD": "/tmp/x"}, "working_dir": "/tmp"}
        for name, value in wanted.items():
            with pytest.raises(PrefectHTTPStatusError, match="422"):
                client.create_flow_run_from_deployment(before, job_variables={name: value})
        del wanted["env"]  # the server alone keeps it out
        made_of = asyncio.run(ProcessJobConfiguration.from_template_and_values(pool.base_job_template, wanted))
        assert made_of.command is None and made_of.working_dir is None and made_of.env == deploy.JOB
    finally:
        client.delete_work_pool(deploy.POOL)


def test_the_key_is_made_once_and_found_by_every_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PREFECT_KEY.variable.name, PREFECT_SENT, "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    made = PREFECT_KEY.read()
    assert made == PREFECT_KEY.read() == key_for("http://127.0.0.1:1/api") and len(made) > 40
    assert stat.S_IMODE(PREFECT_KEY.path().stat().st_mode) == 0o600

    note.write({"prefect": "http://127.0.0.1:1/api"})
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    assert key_for("http://127.0.0.1:1/api") == made
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example/api")
    assert key_for("https://prefect.example/api") is None  # not ours: our key is not for it
    monkeypatch.setenv(PREFECT_SENT, "theirs")
    assert key_for("https://prefect.example/api") == "theirs"
    monkeypatch.delenv("PREFECT_API_URL")
    assert key_for("http://127.0.0.1:1/api") == made


@pytest.mark.parametrize("url", ["https://prefect.example/api", "http://127.0.0.1@prefect.example/api"])
def test_the_key_of_the_store_is_sent_to_loopback_alone(home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if `lewis up` was started with `PREFECT_API_URL`, so that its note names a server elsewhere."""
    PREFECT_KEY.read()
    note.write({"prefect": url})
    for name in (PREFECT_KEY.variable.name, PREFECT_SENT):
        monkeypatch.delenv(name, raising=False)
    for named in ("", url):
        monkeypatch.setenv("PREFECT_API_URL", named)
        assert key_for(url) is None
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:2/api")  # another server of this machine
    assert key_for("http://127.0.0.1:2/api") is None
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setenv(PREFECT_SENT, "theirs")
    assert key_for(url) == "theirs"


def test_a_wrong_key_is_told(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    monkeypatch.setenv(PREFECT_SENT, "wrong")
    with (
        pytest.raises(InputError, match=r"wants another key; set PREFECT_API_AUTH_STRING"),
        connected(prefect_url),
        get_client(sync_client=True) as client,
    ):
        client.read_flow_runs()


def test_a_service_on_a_server_with_another_key_says_so(
    prefect_url: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended in a traceback."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    monkeypatch.setenv(PREFECT_SENT, "wrong")
    monkeypatch.setattr(deploy.environment, "prepare", lambda: None)
    monkeypatch.setattr(sys, "argv", ["deploy", "begin"])
    assert deploy.main() == 2
    assert "wants another key; set PREFECT_API_AUTH_STRING" in capsys.readouterr().out


def test_a_block_leaves_no_setting_behind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv(PREFECT_KEY.variable.name, "ours")
    before = dict(os.environ)
    with connected("http://127.0.0.1:1/api"):
        assert (PREFECT_API_URL.value(), PREFECT_API_AUTH_STRING.value()) == ("http://127.0.0.1:1/api", "ours")
        assert os.environ[PREFECT_SENT] == "ours"
    assert dict(os.environ) == before and PREFECT_API_AUTH_STRING.value() == KEY


def test_a_locked_database_is_told_once_in_an_hour_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    now, busy = [0.0], prefect_log.BusyDatabase()
    monkeypatch.setattr(prefect_log, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def logged(why: str) -> str | None:
        try:
            raise sqlite3.OperationalError(why)
        except sqlite3.OperationalError:
            record = logging.LogRecord("prefect.server", logging.ERROR, "x", 1, "it failed: %s", ("a",), sys.exc_info())
        return logging.Formatter().format(record) if busy.filter(record) else None

    first, second = logged("database is locked"), logged("(sqlite3.OperationalError) database is locked")
    assert first and first.startswith("the database was locked for a moment") and "Traceback" not in first
    assert second is None
    assert "Traceback" in str(logged("disk I/O error"))
    now[0] = 3601.0
    assert logged("database is locked") == first
