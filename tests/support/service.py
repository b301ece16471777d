"""`lewis up` as a process of its own next to a local Hub, and what a person would look up about its runs."""

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO, TypeVar

from lewis.store.secrets import PREFECT_KEY
from lewis_flows.service import processes
from lewis_flows.service.credentials import PREFECT_SENT
from tests.support.local_hub import LocalHub, Webhook
from tests.support.prefect_key import credentials

REPO = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join(map(str, (REPO, REPO / "flows", REPO / "tasks")))
SECRET = secrets.token_urlsafe(32)  # that only the Hub and the receiver know
T = TypeVar("T")
_CLAIMS: list[TextIO] = []  # open files, whose locks end with this process


def claimed_port() -> int:
    """As `free_port`, for a server that this process starts itself: no `lewis` process is given the port either."""
    given = Path(tempfile.gettempdir()) / "lewis-test-ports"
    given.mkdir(exist_ok=True)
    while True:
        port = processes.free_port()
        claim = (given / f"{port}").open("w")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.close()
            continue
        _CLAIMS.append(claim)
        return port


def free_port() -> int:
    """A port where nobody listens, and which no other process of these tests has been given while this one lives."""
    port = claimed_port()
    processes.release(port)  # a `lewis up` that is started on it claims it
    return port


def children(pid: int) -> dict[int, str]:
    """Process id -> command line of all descendants that live, read from /proc: tests ask many times a second."""
    parents: dict[int, int] = {}
    dead = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat") as stat:
            state, parent = stat.read().rpartition(")")[2].split()[:2]
            parents[int(name)] = int(parent)
            if state == "Z":
                dead.add(int(name))
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    words = {}
    for each in found - dead:
        with suppress(OSError):
            words[each] = Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return words


class Sink:
    """Takes notifications: every POST's JSON, in `received`."""

    def __init__(self) -> None:
        self.received: list[dict[str, str]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/notify"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


class Service:
    """A running `lewis up`; use as a context manager.

    Attributes:
        home, temporary: its store, and its folder for temporary files.
        recipes: its recipes folder, empty at first.
        sink: what it notifies.
        environment: of the service, beyond that of the tests.
        command, folder: how it is started, and where. Changes of these three count from the next `start`.
        patience: seconds until it is started.
    """

    def __init__(self, root: Path, hub: LocalHub, *, poll: int = 0) -> None:
        self.home, self.recipes, self.hub = root / "home", root / "recipes", hub
        self.recipes.mkdir(parents=True)
        self.sink = Sink()
        ports = {name: free_port() for name in ("PREFECT_SERVER_API_PORT", "MLFLOW_PORT", "LEWIS_WEBHOOK_PORT")}
        self.api = f"http://127.0.0.1:{ports['PREFECT_SERVER_API_PORT']}/api"
        self.mlflow = f"http://127.0.0.1:{ports['MLFLOW_PORT']}"
        self.webhook = f"http://127.0.0.1:{ports['LEWIS_WEBHOOK_PORT']}/webhook"
        self.environment = {
            **hub.environment(root / "client"),
            **{name: str(port) for name, port in ports.items()},
            "LEWIS_HOME": str(self.home),
            "LEWIS_RECIPES": str(self.recipes),
            "LEWIS_WEBHOOK_SECRET": SECRET,
            "LEWIS_NOTIFY_URL": self.sink.url,
            "LEWIS_POLL_SECONDS": str(poll),
            # The first is a place for a sitecustomize.py.
            "PYTHONPATH": f"{root / 'patch'}{os.pathsep}{PYTHONPATH}",
            "TMPDIR": str(root / "tmp"),  # a device slot of its own
        }
        self.patience = 300.0
        self.temporary = root / "tmp"
        self.temporary.mkdir()
        self.patch = root / "patch" / "sitecustomize.py"
        self.patch.parent.mkdir()
        self.command = [sys.executable, "-m", "lewis_flows.cli.main", "up"]
        self.folder = REPO
        self.log = root / "up.log"

    def __enter__(self) -> "Service":
        self.start()
        self.hub.webhooks.append(Webhook(self.webhook, SECRET))
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.webhooks.clear()
        self.stop()

    def start(self) -> None:
        # PREFECT_HOME is that of the tests' own server: two servers on one database would serve each other's runs.
        left_out = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", PREFECT_KEY.variable.name, PREFECT_SENT)
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**environment, **self.environment},
                start_new_session=True,  # so that its whole group can be killed
            )
        # A service that was killed has left its note.
        own = lambda note: "webhook" in note and note["pid"] == self.process.pid  # noqa: E731
        self.until(lambda: own(self.note()) or self.process.poll() is not None, self.patience)
        assert self.process.poll() is None, self.log.read_text()
        self.until(lambda: any("worker start" in args for args in self.parts().values()), self.patience)

    def stop(self) -> None:
        parts = self.parts()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(self.patience / 2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        assert not parts.keys() & set(map(int, filter(str.isdigit, os.listdir("/proc")))), "a part outlived `lewis up`"
        assert "Exception ignored" not in self.log.read_text()  # Python ended something when half of itself was gone

    def note(self) -> dict[str, Any]:
        path = self.home / "service.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def key(self) -> str:
        """What its Prefect server asks for."""
        return (self.home / "prefect-api-key").read_text().strip()

    def password(self) -> str:
        """What its MLflow server asks for, with the user `lewis`."""
        return (self.home / "mlflow-password").read_text().strip()

    def parts(self) -> dict[int, str]:
        return children(self.process.pid)

    def part(self, words: str) -> int:
        """The process id of the part whose command line has `words`."""
        return next(pid for pid, args in sorted(self.parts().items()) if words in args)

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """One request of Prefect's API; as Prefect's own client does, asks again when the server is too busy."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **credentials(self.key())}
        request = urllib.request.Request(self.api + path, data, headers, method=method)
        for pause in (1, 2, 4, 0):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read()
                break
            except urllib.error.HTTPError as error:
                if error.code != 503 or not pause:
                    raise
                time.sleep(pause)
        return json.loads(text) if text else None

    def runs(self, recipe: str) -> list[dict[str, Any]]:
        """The merges of a recipe, oldest first, without those that are only scheduled for later."""
        flow = {"flows": {"name": {"any_": ["merge"]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.ask("/flow_runs/filter", flow)
        return [run for run in found if run["parameters"].get("recipe") == recipe and run["start_time"]]

    def finished(self, recipe: str, count: int, timeout: float = 300) -> list[dict[str, Any]]:
        """Wait until `count` merges of a recipe have ended, and none is going on."""

        def ended() -> list[dict[str, Any]] | None:
            runs = self.runs(recipe)
            over = [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]
            return runs if len(over) >= count and len(over) == len(runs) else None

        return self.until(ended, timeout, pause=1.0)  # each look is a page of runs

    def start_run(self, deployment: str, **parameters: Any) -> str:
        """Start a run by hand, as the UI does; gives its id."""
        found = self.ask(f"/deployments/name/{deployment}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def deployment(self, recipe: str) -> Any:
        """The deployment that merges a recipe; None if there is none."""
        try:
            return self.ask(f"/deployments/name/merge/{recipe}")
        except urllib.error.HTTPError:
            return None

    def poll(self, recipe: str) -> None:
        """Look at one recipe now, as the service's own poll does."""
        given = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        own = {"PREFECT_API_URL": self.api, PREFECT_SENT: self.key(), "MLFLOW_TRACKING_URI": self.mlflow}
        own |= {"MLFLOW_TRACKING_USERNAME": "lewis", "MLFLOW_TRACKING_PASSWORD": self.password()}
        own |= {"LEWIS_RECIPES": str(self.recipes)}  # not those of the checkout, in which this process is
        code = f"from lewis_flows import watch; watch.poll([{recipe!r}])"
        subprocess.run([sys.executable, "-c", code], env={**given, **self.environment, **own}, check=True, timeout=120)

    def answers(self) -> bool:
        """Whether the Prefect server does."""
        try:
            with urllib.request.urlopen(f"{self.api}/health", timeout=5):
                return True
        except OSError:
            return False

    def versions(self, name: str) -> list[Any]:
        """The registered versions, newest first."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.home}/mlflow/mlflow.db")
        found = sorted(client.search_model_versions(f"name='{name}'"), key=lambda each: -int(each.version))
        return [client.get_model_version(name, each.version) for each in found]  # with its aliases

    def until(self, found: Callable[[], T], timeout: float, pause: float = 0.2) -> T:
        """Wait for a true value; `found` may fail while a server is down."""
        deadline, last = time.monotonic() + timeout, None
        while time.monotonic() < deadline:
            try:
                last = found()
            except OSError as error:
                last = error
            if last and not isinstance(last, OSError):
                return last
            time.sleep(pause)
        raise AssertionError(f"not within {timeout} s: {last}\n{self.log.read_text()[-6000:]}")


def seconds(run: dict[str, Any], key: str = "start_time") -> float:
    """A time of a run as Unix time."""
    return datetime.fromisoformat(run[key].replace("Z", "+00:00")).timestamp()
