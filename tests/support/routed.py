"""Two servers that load adapters, a real HAProxy before them, and a Prometheus that answers as a test says."""

import subprocess
import tempfile
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
from tests.support.asking import asking
from tests.support.http_sink import HttpSink, Request
from tests.support.lora_server import LoraServer
from tests.support.service import free_port

CONFIG = """
global
  stats socket {socket} mode 600 level admin
defaults
  mode http
  retries 3
  option redispatch 1
  retry-on conn-failure empty-response
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  timeout check 30s
  option httpchk
  http-check send meth GET uri /v1/models
  http-check expect rstring '"id": ?"tiny"'
frontend all
  bind 127.0.0.1:{port}
  default_backend champion
backend champion
  server blue {blue} weight 100 check inter {inter} rise 1 fall 2
  server green {green} weight 0 check inter {inter} rise 1 fall 2
"""


class Place:
    """Two servers that load adapters, HAProxy before them, and a Prometheus that answers as a test says.

    Attributes:
        url: what clients ask.
        values: server -> number of errors that Prometheus says it had, in hundredths of all requests.
        count: how many requests Prometheus says that a server had.

    HAProxy asks a server every `inter` whether it has the model that clients ask for.
    """

    def __init__(
        self, servers: dict[str, LoraServer], prometheus: HttpSink, folder: Path, more: str = "", inter: str = "100ms"
    ) -> None:
        port = free_port()
        self.servers, self.url, self.values, self.count = servers, f"http://127.0.0.1:{port}", dict[str, float](), 99.0
        self.prometheus = prometheus
        socket, config = str(folder / "s"), folder / "haproxy.cfg"
        self._socket = Path(socket)
        at = {name: each.url.removeprefix("http://") for name, each in servers.items()}
        config.write_text(CONFIG.format(socket=socket, port=port, inter=inter, **at) + more)
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

    def start(self) -> None:
        """Start HAProxy, with the weights of its configuration."""
        self._socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command)
        while not self._socket.exists():
            assert self.process.poll() is None
            time.sleep(0.02)

    def kill(self) -> None:
        """End HAProxy at once."""
        self.process.kill()
        self.process.wait()

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
        made.start()
        try:
            yield made
        finally:
            made.kill()


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

    def ask(*_: int) -> str:
        listed = requests.get(f"{place.url}/v1/models", timeout=10).json()["data"]
        return {each["id"]: each["root"] for each in listed}.get("tiny", "nothing")

    end = time.monotonic() + 30
    while not requests.get(f"{place.url}/v1/models", timeout=10).ok and time.monotonic() < end:
        time.sleep(0.05)  # HAProxy has not seen yet that a server has a version
    with asking(ask, clients=1) as seen:
        yield seen
