"""Two servers that load adapters, a real HAProxy before them, and a Prometheus that says what it is told."""

import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import requests

from lewis.recipe.serve import HaproxyTarget, Rule
from lewis.serving import haproxy
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.store.kinds import SERVED
from tests.support.http_sink import HttpSink, Request
from tests.support.lora_server import LoraServer
from tests.support.service import free_port

CONFIG = """
global
  stats socket {socket} mode 600 level admin
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend all
  bind 127.0.0.1:{port}
  default_backend champion
backend champion
  server blue {blue} weight 100
  server green {green} weight 0
"""


class Place:
    """Two servers that load adapters, HAProxy before them, and a Prometheus that says what it is told.

    Attributes:
        url: what clients ask.
        values: server -> number of errors that Prometheus says it had, in hundredths of all requests.
        count: how many requests Prometheus says that a server had.
    """

    def __init__(self, servers: dict[str, LoraServer], prometheus: HttpSink, folder: Path, more: str) -> None:
        port = free_port()
        self.servers, self.url, self.values, self.count = servers, f"http://127.0.0.1:{port}", dict[str, float](), 99.0
        socket, config = str(folder / "s"), folder / "haproxy.cfg"
        at = {name: each.url.removeprefix("http://") for name, each in servers.items()}
        config.write_text(CONFIG.format(socket=socket, port=port, **at) + more)
        self.command = ["haproxy", "-db", "-f", str(config)]
        prometheus.answer = self._answered
        rule = Rule(name="errors", query='errors{server="{server}"}[{window}]', plus=0.01)
        self.target = HaproxyTarget(
            kind="haproxy",
            socket=socket,
            backend="champion",
            servers={name: each.url for name, each in servers.items()},
            prometheus=prometheus.url,
            minutes=0.002,
            patience_minutes=0.01,
            rules=(rule,),
            count='count{server="{server}"}',
        )

    def _answered(self, request: Request) -> Any:
        [query] = parse_qs(request.body)["query"]
        server = "blue" if 'server="blue"' in query else "green"
        value = self.count if query.startswith("count") else self.values.get(server, 0.0)
        return {"status": "success", "data": {"result": [{"value": [0, str(value)]}]}}

    def has(self, name: str) -> str | None:
        """The path that a server answers with under the name that clients ask for."""
        return self.servers[name].models.get("tiny")


@contextmanager
def routed(more: str = "") -> Iterator[Place]:
    """Both servers, HAProxy and Prometheus, running; `more` is added to HAProxy's configuration."""
    with (
        LoraServer("tiny") as blue,
        LoraServer("tiny") as green,
        HttpSink() as prometheus,
        tempfile.TemporaryDirectory(dir="/tmp") as folder,  # the path of a socket has a limit
    ):
        made = Place({"blue": blue, "green": green}, prometheus, Path(folder), more)
        process = subprocess.Popen(made.command)
        try:
            while not Path(made.target.socket).exists():
                assert process.poll() is None
                time.sleep(0.02)
            yield made
        finally:
            process.kill()
            process.wait()


def model(number: int) -> Model:
    """A version of the model `tiny`."""
    made = Model("tiny", str(number), str(number) * 64, Path(), "lora")
    return Model("tiny", str(number), str(number) * 64, SERVED.path(made.alias), "lora")


def serve(place: Place, new: Model, before: Served) -> Served:
    """Offer a model and move the traffic to it."""
    haproxy.offer(place.target, new, before)
    alias = haproxy.put(place.target, new, before)
    return before.took(new.uri, new.digest, alias, "")


@contextmanager
def clients(place: Place) -> Iterator[list[str]]:
    """Meanwhile, clients list the models all the time; gives the path of each answer, or the error."""
    seen, over = list[str](), threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                listed = requests.get(f"{place.url}/v1/models", timeout=10).json()["data"]
                seen.append({each["id"]: each["root"] for each in listed}.get("tiny", "nothing"))
            except Exception as error:
                seen.append(f"error: {error}")

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
