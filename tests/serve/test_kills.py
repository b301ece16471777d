"""Killed at ten points of a canary: the flow, a server, the router. Clients get the old version or the new one.

The servers load adapters with vLLM's protocol and run none, so that a point takes seconds; HAProxy is a real one.
"""

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from lewis.registry import versions
from lewis.serving import canary, haproxy
from lewis.serving.records import served
from lewis_flows.serve import serve_flow
from lewis_tasks.support.flow_run import result_of_run
from tests.conftest import Family
from tests.flows.conftest import Command
from tests.support.http_sink import HttpSink, Request
from tests.support.lineage import crowned, with_tokenizer
from tests.support.lora_server import LoraServer
from tests.support.routed import Place, routed

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="apt install haproxy")
RECIPE = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [{"model": "org/math"}],
    "register": {"name": "tiny"},
    "output": {"kind": "lora", "rank": 4},
}
QUICK = "from lewis.serving import canary; canary._PAUSE = 0.05"
POINTS = [
    ("flow", r"load tiny-2-\w+", 1),
    ("flow", "load tiny", 1),
    ("flow", "set weight", 2),
    ("flow", "query", 3),
    ("flow", "set weight", 6),
    ("new server", r"load tiny-2-\w+", 1),
    ("new server", "query", 2),
    ("old server", "query", 2),
    ("router", "query", 2),
    ("router", "set weight", 5),
]
"""What is killed, and at which event, the how many-th of its kind."""


class Trap:
    """Sees all that a run asks servers, router and Prometheus for; does something once, at a point.

    Attributes:
        at, number, act: the point, and what is done there, before the request is answered.
        sprung: whether it was.
    """

    def __init__(self, place: Place) -> None:
        self.at, self.number, self.sprung = "", 0, False
        self.act: Callable[[], None] = lambda: None
        for server in place.servers.values():
            self.watch(server)
        answered = place._answered
        place.prometheus.answer = lambda request: self.see("query") or answered(request)
        self._router, path = place.target.socket, f"{place.target.socket}.relay"
        place.target = place.target.model_copy(update={"socket": path})
        self._relay = socket.socket(socket.AF_UNIX)
        self._relay.bind(path)
        self._relay.listen()
        threading.Thread(target=self._pass_on, daemon=True).start()

    def watch(self, server: HttpSink) -> None:
        """Look at what a server is asked to load."""
        answered = server.answer

        def see(request: Request) -> Any:
            if request.path == "/v1/load_lora_adapter":
                self.see(f"load {request.json['lora_name']}")
            return answered(request)

        server.answer = see

    def see(self, event: str) -> None:
        """Count an event, and act at the point."""
        if self.number and re.fullmatch(f"{self.at}( .*)?", event):
            self.number -= 1
            if self.number == 0:
                self.sprung = True
                self.act()

    def _pass_on(self) -> None:
        """Hand each command to HAProxy, and its answer back; a router that is away gives none."""
        while True:
            client, _ = self._relay.accept()
            with client, socket.socket(socket.AF_UNIX) as router:
                try:
                    command = client.recv(4096)
                    self.see(command.decode().strip())
                    router.connect(self._router)
                    router.sendall(command)
                    client.sendall(b"".join(iter(lambda: router.recv(4096), b"")))
                except OSError:
                    continue


class Clients:
    """Ask the router all the time; use as a context manager.

    Attributes:
        seen: when each answer came, and the version that gave it; or the error.
        away: from when to when there was no router.
    """

    def __init__(self, url: str) -> None:
        self.url, self.over, self.away = url, threading.Event(), (0.0, 0.0)
        self.seen = list[tuple[float, str]]()

    def ask(self) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            try:
                listed = requests.get(f"{self.url}/v1/models", timeout=10)
                listed.raise_for_status()
                found = Path({each["id"]: each["root"] for each in listed.json()["data"]}["tiny"]).name
            except (requests.RequestException, KeyError) as error:
                found = f"error: {error}"
            self.seen.append((began, found))
            time.sleep(0.005)

    def answers(self) -> set[str]:
        """The versions that answered, and the errors, but those of the time in which there was no router."""
        begin, end = self.away
        return {what for when, what in self.seen if not begin - 1 <= when <= end}

    def __enter__(self) -> "Clients":
        self.threads = [threading.Thread(target=self.ask) for _ in range(2)]
        for each in self.threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for each in self.threads:
            each.join()


def kill(what: str, place: Place, trap: Trap, clients: Clients, run: subprocess.Popen[str]) -> None:
    """Kill the flow, or the router or a server, which starts again after a second: a server without its adapters."""

    def start_router() -> None:
        place.start()
        clients.away = (clients.away[0], time.monotonic())

    def start_server(name: str, port: int) -> None:
        place.servers[name] = LoraServer("tiny", port=port).__enter__()
        trap.watch(place.servers[name])

    if what == "flow":
        os.kill(run.pid, 9)
    elif what == "router":
        clients.away = (time.monotonic(), time.monotonic() + 600)
        place.kill()
        threading.Timer(1, start_router).start()
    else:
        name = {"new server": "blue", "old server": "green"}[what]
        port = place.servers[name]._server.server_port
        place.servers[name].__exit__()
        threading.Timer(1, start_server, (name, port)).start()


@pytest.mark.parametrize(("what", "at", "number"), POINTS)
def test_old_or_new_answers_and_the_next_run_ends_it(
    what: str,
    at: str,
    number: int,
    home: Path,
    family: Family,
    prefect_url: str,
    lewis: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(canary, "_PAUSE", 0.05)
    adapter, recipe = with_tokenizer(family.lora, tmp_path / "adapter"), tmp_path / "nightly.yaml"

    def serve() -> Any:
        with temporary_settings({PREFECT_API_URL: prefect_url}):
            return result_of_run(serve_flow(str(recipe), return_state=True))

    with routed() as place:
        trap = Trap(place)
        target = place.target.model_dump(mode="json", exclude_defaults=True)
        recipe.write_text(yaml.safe_dump(RECIPE | {"serve": target}))
        first = crowned(adapter, "a", base=family.base)
        assert serve().changed == ["haproxy"]
        assert haproxy.weights(place.target) == {"blue": 0, "green": 100}
        old = served("tiny")[0].alias
        with Clients(place.url) as clients:
            second = crowned(adapter, "b", base=family.base)
            run = lewis("serve", recipe, patch=QUICK)
            trap.act = lambda: kill(what, place, trap, clients, run)
            trap.at, trap.number = at, number
            said, _ = run.communicate(timeout=240)
            assert trap.sprung and (run.returncode == -9 if what == "flow" else run.returncode in (0, 1)), said
            champion = versions.champion("tiny")
            assert champion and champion.version == second.version, "a kill says nothing of the version"
            assert serve().version == second.version.uri
            new = served("tiny")[0].alias
            time.sleep(0.3)
        assert clients.answers() == {old, new}, f"{first.version.uri} or {second.version.uri}"
        assert clients.seen[-1][1] == new and haproxy.weights(place.target) == {"blue": 100, "green": 0}
        print(f"{what} at {at} {number}: {len(clients.seen)} requests, the run ended with {run.returncode}")
