"""The webhook receiver as a process of its own, with a real Prefect server; deliveries come from the local Hub."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from lewis.errors import InputError
from lewis_flows import release_event
from lewis_flows.service import receiver as receiver_module
from lewis_flows.service import webhook
from tests.flows.conftest import REPO
from tests.support.local_hub import LocalHub, Webhook
from tests.support.prefect_key import credentials

SECRET = "hook-Secret_Zx9"
OLD, NEW = "0" * 40, "f" * 40
MERGE = "merge_method: ties\nbase_model: {}\nmodels:\n"
ALPHA = MERGE.format("org/base") + "  - model: org/math\n  - model: org/code@main\n  - model: org/base+org/lora\n"
BETA = MERGE.format(f"org/pinned@{NEW}") + "  - model: org/math\n  - model: org/branch@dev\n"

Reply = tuple[int, dict[str, Any]]


@dataclass
class Receiver:
    port: int
    process: subprocess.Popen[bytes]
    logs: Path
    recipes: Path

    def post(self, body: bytes, *, secret: str | bytes | None = SECRET, path: str = "/webhook") -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", path, body, {"X-Webhook-Secret": secret} if secret is not None else {})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        assert SECRET.encode() not in text
        return response.status, json.loads(text)

    def deliver(self, name: str = "org/math", new: str | None = NEW, **changes: Any) -> Reply:
        return self.post(json.dumps(payload(name, new, **changes)).encode())

    def log(self) -> str:
        return self.logs.read_text()


def payload(
    name: str, new: str | None, *, ref: str = "refs/heads/main", kind: str = "model", **event: str
) -> dict[str, Any]:
    return {
        "event": {"action": "update", "scope": "repo.content", **event},
        "repo": {"type": kind, "name": name, "id": "6", "private": False, "headSha": new, "owner": {"id": "1"}},
        "updatedRefs": [{"ref": ref, "oldSha": OLD, "newSha": new}],
        "webhook": {"id": "3", "version": 3},
    }


@contextmanager
def receiving(folder: Path, api: str, hub: str) -> Iterator[Receiver]:
    """The receiver as a process; when it goes, it must have stayed up and shown nobody the secret.

    Args:
        folder: of its recipes, its log and its store.
        api: of Prefect's server.
        hub: the Hub's URL.
    """
    recipes = folder / "recipes"
    recipes.mkdir()
    (recipes / "alpha.yaml").write_text(ALPHA)
    (recipes / "beta.yaml").write_text(BETA)
    (recipes / "broken.yaml").write_text("models: [")  # must not stop the others
    logs = folder / "receiver.log"
    variables = {"LEWIS_WEBHOOK_SECRET": SECRET, "LEWIS_WEBHOOK_PORT": "0", "LEWIS_RECIPES": str(recipes)}
    variables |= {"PREFECT_API_URL": api, "LEWIS_HOME": str(folder / "home"), "LEWIS_POLL_SECONDS": "0"}
    variables |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "huggingface"), "HF_TOKEN": ""}
    with logs.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lewis_flows.service.webhook"],
            cwd=REPO,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        found = None
        while not found:
            assert process.poll() is None, logs.read_text()
            time.sleep(0.05)
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/webhook", logs.read_text())
        receiver = Receiver(int(found[1]), process, logs, recipes)
        yield receiver
        for path in ("health", "health/live"):
            with urllib.request.urlopen(f"http://127.0.0.1:{receiver.port}/{path}", timeout=60) as answer:
                assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert SECRET not in receiver.log() and "Traceback" not in receiver.log()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """The Hub that the receiver asks."""
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def receiver(prefect_url: str, hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with receiving(tmp_path_factory.mktemp("receiver"), prefect_url, hub.url) as started:
        yield started


def test_it_is_ready_where_the_server_takes_its_key(receiver: Receiver) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{receiver.port}/health/ready", timeout=60) as answer:
        assert (answer.status, json.load(answer)) == (200, {"status": "ready", "missing": []})


def stored(api: str, new: str, expected: int) -> list[dict[str, Any]]:
    """The events about a commit that the server has on disk; waits until there are so many."""
    body = json.dumps({"filter": {"event": {"name": [release_event.EVENT]}}, "limit": 50}).encode()
    deadline = time.monotonic() + 120
    while True:
        headers = {"Content-Type": "application/json", **credentials()}
        request = urllib.request.Request(f"{api}/events/filter", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            events = [each for each in json.load(answer)["events"] if each["payload"]["new"] == new]
        if len(events) >= expected or time.monotonic() > deadline:
            return events
        time.sleep(0.2)


def until(condition: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_commit_on_the_hub_is_an_event_for_each_recipe(receiver: Receiver, prefect_url: str, tmp_path: Path) -> None:
    with LocalHub(tmp_path) as hub:
        first = hub.commit("org/math", {"a.txt": "1"})
        hub.webhooks.append(Webhook(f"http://127.0.0.1:{receiver.port}/webhook", SECRET))
        second = hub.commit("org/math", {"a.txt": "2"})
        (delivery,) = until(lambda: hub.deliveries)
    assert (delivery.status, delivery.attempts) == (202, 1)
    answer = json.loads(delivery.answer)
    assert (answer["status"], answer["recipes"]) == ("accepted", ["alpha", "beta"])
    events = stored(prefect_url, second, 2)
    assert {each["id"] for each in events} == set(answer["events"])
    about = {"ref": "org/math", "repo": "org/math", "old": first, "new": second}
    told = sorted((each["payload"] for each in events), key=lambda p: p["recipe"])
    assert all(p.pop("message").startswith(f"org/math moved: {first[:8]} → {second[:8]}; ") for p in told)
    assert told == [
        {"recipe": "alpha", **about},
        {"recipe": "beta", **about},
    ]
    assert {each["resource"]["prefect.resource.id"] for each in events} == {"lewis.expert.org/math"}
    assert {each["resource"]["lewis.recipe"] for each in events} == {"alpha", "beta"}
    assert f"/webhook 202 accepted org/math {second} for alpha, beta" in receiver.log()


def test_what_is_no_release_is_answered_200_and_dropped(receiver: Receiver, tmp_path: Path) -> None:
    with LocalHub(tmp_path) as hub:
        hub.commit("org/math", {"a.txt": "1"})
        hub.webhooks.append(Webhook(f"http://127.0.0.1:{receiver.port}/webhook", SECRET))
        hub.commit("org/math", {"a.txt": "2"}, branch="experiment")
        hub.commit("org/math", {"a.txt": "3"}, repo_type="dataset")
        hub.commit("org/other", {"a.txt": "3"}, branch="dev", tag="v1")
        deliveries = until(lambda: len(hub.deliveries) == 4 and hub.deliveries)
    assert [(each.status, json.loads(each.answer)["status"]) for each in deliveries] == [(200, "ignored")] * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "repo.config"},
        {"scope": "discussion.comment"},
        {"action": "delete"},
        {"kind": "space"},
        {"kind": "{{ 7*7 }}"},
        {"ref": "refs/pr/1"},
        {"ref": "refs/heads/main\n"},
        {"ref": "refs/heads/../heads/main"},
        {"new": None},  # the branch was deleted
    ],
)
def test_events_that_are_not_ours_are_ignored(receiver: Receiver, changes: dict[str, Any]) -> None:
    status, answer = receiver.deliver(**changes)
    assert (status, answer["status"]) == (200, "ignored")
    assert "{{" not in answer["why"]


@pytest.mark.parametrize(
    "secret", [None, "", "wrong", SECRET[:-1], SECRET + "x", SECRET.lower(), "h\xf6ok".encode(), b"\xff\xfe\x80"]
)
def test_a_wrong_secret_is_refused(receiver: Receiver, secret: str | bytes | None) -> None:
    status, answer = receiver.post(json.dumps(payload("org/math", "1" * 40)).encode(), secret=secret)
    assert (status, answer["status"]) == (401, "refused")


def raw(port: int, head: str, body: Iterator[bytes] | None = None, secret: str = SECRET) -> bytes:
    """The status line of the answer to a request that is sent by hand."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"POST /webhook HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: {secret}\r\n{head}\r\n".encode())
        for part in body or ():
            connection.sendall(part)
        return connection.recv(4096).partition(b"\r\n")[0]


def test_the_secret_is_checked_before_the_body_arrives(receiver: Receiver) -> None:
    assert b" 401 " in raw(receiver.port, "Content-Length: 1000\r\n", secret="wrong")
    assert b" 401 " in raw(receiver.port, "Content-Length: 99999999\r\n", secret="wrong")


def test_a_half_sent_request_is_not_waited_for_for_long(receiver: Receiver) -> None:
    """Neither one without the secret, nor one with it, nor a connection that says nothing, or that goes on slowly."""
    line = "POST /webhook HTTP/1.1\r\nHost: x\r\n"
    secret = f"X-Webhook-Secret: {SECRET}\r\n"
    begun = [
        "",
        line,
        f"{line}{secret}Content-Length: 99\r\n\r\n{{",
        f"{line}{secret}Transfer-Encoding: chunked\r\n\r\n",
    ]
    began = time.monotonic()
    with ExitStack() as stack:
        open_ = [stack.enter_context(socket.create_connection(("127.0.0.1", receiver.port), 30)) for _ in begun]
        for connection, text in zip(open_, begun, strict=True):
            connection.sendall(text.encode())
        with suppress(ConnectionError):
            while time.monotonic() - began < 2 * webhook.MAX_SECONDS:
                open_[-1].sendall(b"1\r\n \r\n")
                time.sleep(0.5)
        for connection in open_:
            with suppress(ConnectionError):
                while connection.recv(100):
                    pass
    assert time.monotonic() - began < 1.5 * webhook.MAX_SECONDS
    assert receiver.deliver(new="8" * 40)[0] == 202


def test_the_time_for_a_request_on_a_kept_connection_begins_with_its_first_byte() -> None:
    """A reverse proxy keeps connections: one that was ten seconds old was closed in the middle of a delivery."""
    answer = b"HTTP/1.1 200"
    line, end = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{", b"}"

    class Transport(asyncio.Transport):
        written, closed = b"", ""

        def write(self, data: Any) -> None:
            self.written += bytes(data)

        def close(self) -> None:
            self.closed = self.closed or "closed"

        def abort(self) -> None:
            self.closed = "aborted"

        def is_closing(self) -> bool:
            return bool(self.closed)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def talk() -> None:
        loop, skipped = asyncio.get_running_loop(), 0.0
        clock, start = loop.time, loop.time()
        loop.time = lambda: start + skipped  # type: ignore[method-assign]  # it stands still otherwise

        async def skip(seconds: float) -> None:
            nonlocal skipped
            skipped += seconds
            for _ in range(20):
                await asyncio.sleep(0)

        def opened() -> tuple[Any, Transport]:
            transport = Transport()
            protocol = webhook._impatient()(uvicorn.Config(app, lifespan="off", log_config=None), ServerState(), {})
            protocol.connection_made(transport)
            return protocol, transport

        try:
            reused, transport = opened()
            for count, pause in enumerate((4, 4, 0), 1):
                reused.data_received(line + end)
                await skip(0)
                assert transport.written.count(answer) == count
                await skip(pause)
            reused.data_received(line)
            await skip(webhook.MAX_SECONDS - 1)  # when the connection is older than that
            assert not transport.closed
            reused.data_received(end)
            await skip(0)
            assert transport.written.count(answer) == 4 and not transport.closed
            reused.data_received(line[:9])
            await skip(webhook.MAX_SECONDS - 1)
            reused.data_received(line[9:])
            await skip(2)
            assert transport.closed == "aborted"

            idle, transport = opened()
            await skip(webhook.MAX_SECONDS - 1)
            idle.data_received(line + end)
            await skip(2)
            assert transport.written.count(answer) == 1 and not transport.closed
            await skip(idle.timeout_keep_alive)
            assert transport.closed == "closed"

            _, transport = opened()  # which says nothing
            await skip(webhook.MAX_SECONDS + 1)
            assert transport.closed == "aborted"
        finally:
            loop.time = clock  # type: ignore[method-assign]

    asyncio.run(talk())


def test_an_oversized_body_is_refused_before_it_arrives(receiver: Receiver) -> None:
    assert b" 413 " in raw(receiver.port, f"Content-Length: {webhook.MAX_BODY + 1}\r\n")


def test_an_endless_body_is_refused_and_not_kept(receiver: Receiver) -> None:
    def memory() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{receiver.process.pid}/status").read_text())
        assert found
        return int(found[1]) // 1024

    before = memory()
    chunks = (b"10000\r\n" + b"x" * 0x10000 + b"\r\n" for _ in range(1024))  # 64 MiB, its length not told
    assert b" 413 " in raw(receiver.port, "Transfer-Encoding: chunked\r\n", chunks)
    assert memory() - before < 16


def test_a_body_of_the_largest_size_is_read(receiver: Receiver) -> None:
    body = json.dumps(payload("org/math", "2" * 40)).encode()
    assert receiver.post(body.ljust(webhook.MAX_BODY))[0] == 202


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "org/../math", "org/..", "../math", "/org/math", "org/math/", "org/math/x", "gpt2", "", "/",
        "org//math", "org/math\x00", "org/math\n", "org/math\r\nFAKE 202 accepted", "org%2fmath", "org\\math", "~/math",
        "{{ 7*7 }}/math", "org/{{ event.id }}", "${HOME}/math", "org/$(id)", "org/ma th", "-org/math", "org/é",
        "o" * 97 + "/math", "org/math.git", "org/math@main", "org/base+org/lora",
    ],
)  # fmt: skip
def test_a_name_that_no_recipe_can_follow_is_ignored_and_not_repeated(receiver: Receiver, name: str) -> None:
    """The Hub has names without `/`, and switches off a webhook that is answered with errors."""
    status, answer = receiver.deliver(name)
    assert (status, answer["status"]) == (200, "ignored")
    assert answer["why"] == "no recipe can follow a repo of this name" and "repo" not in answer
    log = re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", receiver.log())  # a clock says 49 too
    for said in (json.dumps(answer), log):
        assert not re.search(r"FAKE|\{\{|\$\(|\$\{|\b49\b(?! ms)|passwd", said)
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in receiver.log().splitlines() if "recipe" not in line)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"not json", b"[]", b"null", b'"x"', b"{}", b"\xff\xfe", b"[" * 200_000, b'{"event":' * 50_000,
        b'{"event": {"action": "update"', b"1" * 5000,
        json.dumps(payload("\ud800/x", NEW)).encode(),
    ],
)  # fmt: skip
def test_a_body_that_is_no_payload_is_refused(receiver: Receiver, body: bytes) -> None:
    assert receiver.post(body)[0] == 422


@pytest.mark.parametrize("sha", ["", "f" * 39, "f" * 41, "F" * 40, "g" * 40, "{{7*7}}", "f" * 40 + "\n", 7, ["f" * 40]])
def test_a_commit_that_is_none_is_refused(receiver: Receiver, sha: Any) -> None:
    assert receiver.deliver(new=sha)[0] == 422
    body = payload("org/math", NEW)
    body["updatedRefs"][0]["oldSha"] = sha
    assert receiver.post(json.dumps(body).encode())[0] == 422


@pytest.mark.parametrize("name", ["org/unknown", "other/math", "org/pinned", "org/branch"])
def test_a_repo_that_no_recipe_follows_is_ignored(receiver: Receiver, name: str) -> None:
    """The Hub would switch off the webhook of an organisation that is answered with errors."""
    status, answer = receiver.deliver(name)
    assert (status, answer["status"]) == (200, "ignored")
    assert answer["why"] == "no recipe follows the main branch of this repo"


@pytest.mark.parametrize(
    ("name", "new"), [("org/base", "31"), ("org/code", "32"), ("org/lora", "33"), ("Org/Base", "34")]
)
def test_every_model_of_a_recipe_is_followed(receiver: Receiver, name: str, new: str) -> None:
    status, answer = receiver.deliver(name, new * 20)
    assert (status, answer["recipes"]) == (202, ["alpha"])


def test_a_release_is_announced_once(receiver: Receiver, prefect_url: str) -> None:
    new = "4" * 40
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: receiver.deliver(new=new), range(8)))
    assert sorted((status, answer["status"]) for status, answer in answers) == [
        *[(200, "duplicate")] * 7,
        (202, "accepted"),
    ]
    time.sleep(1)
    assert len(stored(prefect_url, new, 2)) == 2  # one for each recipe


def test_an_earlier_commit_is_a_release_again_only_if_it_is_the_newest_again(
    receiver: Receiver, hub: LocalHub, prefect_url: str
) -> None:
    """Old deliveries that were sent again in turns each started a run."""
    first, bad = commits = [hub.commit("org/math", {"a.txt": each}) for each in ("good", "bad")]
    for new in commits:
        assert receiver.deliver(new=new)[0] == 202
        assert len(stored(prefect_url, new, 2)) == 2
    for new in (first, bad, first):
        status, answer = receiver.deliver(new=new)
        assert (status, answer["status"]) == (200, "duplicate")
    hub.repos["model", "org/math"].branches["main"] = first  # somebody took the last one back
    status, answer = receiver.deliver(new=first)
    assert (status, answer["recipes"]) == (202, ["alpha", "beta"])
    assert len(stored(prefect_url, first, 4)) == 4 and len(stored(prefect_url, bad, 2)) == 2


def test_an_earlier_commit_is_a_release_where_the_hub_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = []
    monkeypatch.setattr(receiver_module, "_ask", lambda followers, new: (set(), set(), {*followers}))
    monkeypatch.setattr(receiver_module, "announce", lambda *given: announced.append(given[0]) or "id")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    (tmp_path / "alpha.yaml").write_text(ALPHA)
    body = json.dumps(payload("org/math", "9" * 40)).encode()
    with LocalHub(tmp_path / "hub") as hub:
        hub.commit("org/math", {"a.txt": "1"})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        taker = receiver_module.Receiver()
        assert taker.take(body)[0] == 200 and not announced
        hub.faults.append({"path": "^/api/models/org/math$", "status": 503})
        assert taker.take(body)[0] == 202 and announced == ["alpha"]


def test_recipes_are_deployed_before_a_release_is_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    monkeypatch.setattr(receiver_module, "_ask", lambda followers, new: (set(), set(), set()))
    monkeypatch.setattr(receiver_module, "announce", lambda *given: done.append("announced") or "id")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    (tmp_path / "alpha.yaml").write_text(ALPHA)
    taker = receiver_module.Receiver(lambda: done.append("deployed"))
    body = json.dumps(payload("org/math", "8" * 40)).encode()
    assert taker.take(body)[0] == 202 and done == ["deployed", "announced"]
    assert taker.take(body)[0] == 200 and len(done) == 2  # a duplicate


def test_a_recipe_that_is_dropped_in_counts_at_once(receiver: Receiver) -> None:
    assert receiver.deliver("org/late")[0] == 200
    (receiver.recipes / "late.yml").write_text(ALPHA.replace("org/math", "org/late"))
    status, answer = receiver.deliver("org/late")
    assert (status, answer["recipes"]) == (202, ["late"])
    (receiver.recipes / "late.yml").unlink()


def test_other_addresses_are_closed_and_logged_without_the_secret(receiver: Receiver) -> None:
    for path in ("/docs", "/redoc", "/openapi.json", "/webhook/", f"/webhook/{SECRET}", f"/?secret={SECRET}"):
        assert receiver.post(b"{}", path=path)[0] == 404
    assert receiver.post(b"{}", path="/x%0d%0aFAKE%1b[31m")[0] == 404
    until(lambda: "404" in receiver.log() and "/x??FAKE?[31m 404" in receiver.log())
    assert "/webhook/*** 404" in receiver.log()
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"http://127.0.0.1:{receiver.port}/webhook", timeout=60)


@contextmanager
def forwarding(port: int, target: str) -> Iterator[None]:
    """Connections to `port` reach `target`: a Prefect server that came up."""
    listening = socket.create_server(("127.0.0.1", port))

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(ConnectionError), sink:  # the server may end first
            while part := source.recv(65536):
                sink.sendall(part)

    def accept() -> None:
        while True:
            try:
                inner, outer = listening.accept()[0], socket.create_connection(("127.0.0.1", int(target)))
            except OSError:
                return
            for pair in ((inner, outer), (outer, inner)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def test_a_release_that_prefect_does_not_take_is_to_be_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    (tmp_path / "alpha.yaml").write_text(ALPHA)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        status, answer = receiver_module.Receiver().take(json.dumps(payload("org/code", "5" * 40)).encode())
    assert (status, answer["status"]) == (503, "failed")


@pytest.mark.long
def test_a_release_is_not_lost_while_prefect_is_down(prefect_url: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        LocalHub(tmp_path / "hub") as hub,
        receiving(tmp_path, f"http://127.0.0.1:{port}/api", hub.url) as receiver,
    ):
        status, answer = receiver.deliver("org/code", "5" * 40)
        assert (status, answer["status"]) == (503, "failed")
        assert "Prefect did not take the event (ConnectError)" in receiver.log()
        hub.webhooks.append(Webhook(f"http://127.0.0.1:{receiver.port}/webhook", SECRET))
        new = hub.commit("org/math", {"a.txt": "1"})
        until(lambda: new in receiver.log() or receiver.log().count(" 503 ") > 1)
        with forwarding(port, prefect_url.rsplit(":")[-1].removesuffix("/api")):
            (delivery,) = until(lambda: hub.deliveries)
            assert (delivery.status, json.loads(delivery.answer)["status"]) == (202, "accepted")
            assert delivery.attempts > 1
            assert len(stored(prefect_url, new, 2)) == 2


def test_an_empty_secret_is_refused() -> None:
    with pytest.raises(InputError, match="LEWIS_WEBHOOK_SECRET"):
        webhook.create_app("")


def test_a_delivery_that_is_sent_again_is_known_after_a_restart(
    prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    (tmp_path / "replayed.yaml").write_text(ALPHA)
    new = "7" * 40
    body = json.dumps(payload("org/code", new)).encode()
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        assert receiver_module.Receiver().take(body)[0] == 202
        assert len(stored(prefect_url, new, 1)) == 1
        status, answer = receiver_module.Receiver().take(body)  # a new one, which remembers nothing
        assert (status, answer["status"]) == (200, "duplicate")
        (tmp_path / "new.yaml").write_text(ALPHA)
        status, answer = receiver_module.Receiver().take(body)
        assert (status, answer["recipes"]) == (202, ["new"])
    assert len(stored(prefect_url, new, 2)) == 2
