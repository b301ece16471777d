"""The webhooks of MLflow's registry fire when an alias moves, also where a process opens the database itself."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lewis import store
from lewis.registry import tracking
from lewis.registry.aliases import set_alias
from lewis_flows.service import credentials, note
from lewis_flows.service.processes import free_port
from lewis_flows.service.servers import mlflow_process


class Receiver(ThreadingHTTPServer):
    """Takes what webhooks send."""

    def __init__(self) -> None:
        self.got = list[dict[str, Any]]()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def aliases(self, wanted: int) -> list[tuple[str, str]]:
        """Alias and version of each event, once so many have come."""
        deadline = time.monotonic() + 30
        while len(self.got) < wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        return [(each["data"]["alias"], each["data"]["version"]) for each in self.got]


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_with_another_database_is_not_asked(home: Path, tmp_path: Path) -> None:
    """A trial on a database of its own moved the champion of the service."""
    with tracking.client("x") as client:
        client.create_registered_model("tiny")
        client.create_model_version("tiny", str(tmp_path), await_creation_for=0)
        asked = Receiver()
        own = {
            "mlflow": f"http://127.0.0.1:{asked.server_port}",
            note.database_of("mlflow"): str(tmp_path / "other.db"),
        }
        note.write(own)
        set_alias(client, "tiny", "champion", "1")
        asked.shutdown()
        assert asked.got == [] and client.get_registered_model("tiny").aliases == {"champion": 1}


@pytest.mark.long
def test_an_alias_is_set_through_the_server_of_the_store(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    with tracking.client("x") as client:
        assert client.tracking_uri.startswith("sqlite:")
        client.create_registered_model("tiny")
        for _ in range(3):
            client.create_model_version("tiny", str(tmp_path), await_creation_for=0)
        receiver = Receiver()
        url = f"http://127.0.0.1:{receiver.server_port}/hook"
        client.create_webhook("moves", url, ["model_version_alias.created"])
        server, url = mlflow_process(free_port(), f"sqlite:///{home}/mlflow/mlflow.db")
        server.start()
        try:
            served = {"mlflow": url, note.database_of("mlflow"): str(home / "mlflow" / "mlflow.db")}
            note.write({**served, "mlflow_user": credentials.mlflow_user()})
            set_alias(client, "tiny", "champion", "1")
            assert receiver.aliases(1) == [("champion", "1")] and "no webhook" not in caplog.text
            # `lewis up` was killed: another process may answer there now, which must not get the password.
            known = note.read()
            for writer in ("elsewhere-1", f"{store.writer().rpartition('-')[0]}-{1 << 22}", None):
                store.write_json(home / "service.json", {**known, "writer": writer})
                set_alias(client, "tiny", "champion", "2")
            note.write({**served, "mlflow_user": "somebody else"})
            set_alias(client, "tiny", "previous", "3")
            assert "no webhook fires" in caplog.text
            note.write({**served, "mlflow_user": credentials.mlflow_user()})
            set_alias(client, "tiny", "champion", "3")
            assert receiver.aliases(2) == [("champion", "1"), ("champion", "3")]
            assert client.get_registered_model("tiny").aliases == {"champion": 3, "previous": 3}
        finally:
            server.stop()
            receiver.shutdown()
