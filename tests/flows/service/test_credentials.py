"""The password of an MLflow server that is started here, and what a server says that wants another."""

import configparser
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

from lewis import settings, store
from lewis.errors import InputError, LewisError
from lewis.registry import tracking
from lewis.serving import slots
from lewis.store.secrets import MLFLOW_PASSWORD, PREFECT_KEY
from lewis_flows.service import credentials, mlflow_app, note, servers, worker
from lewis_flows.service.servers import mlflow_process


@pytest.fixture
def refusing() -> Iterator[str]:
    """The URL of a server that knows nobody."""
    yield from answering(401, b"You are not authenticated.")


@pytest.fixture
def healthy() -> Iterator[str]:
    """The URL of a server that is up."""
    yield from answering(200, b"true")


def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(("user", "told"), [("", "no user was refused"), ("ann", "the password of ann was refused")])
def test_a_wrong_password_is_told_in_one_sentence(
    home: Path, refusing: str, user: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing)
    if user:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not it")
    with pytest.raises(InputError, match=f"{told}; set MLFLOW_TRACKING_USERNAME and") as error, tracking.client("x"):
        pass
    assert "not it" not in str(error.value)


def test_the_password_is_in_the_environment_of_the_server_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = mlflow_process(1, "sqlite:///x")
    secret = MLFLOW_PASSWORD.read()
    assert MLFLOW_PASSWORD.path().stat().st_mode & 0o77 == 0
    assert server._environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == secret
    assert server._environment["MLFLOW_BACKEND_STORE_URI"] == "sqlite:///x"
    assert server._environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:1,http://localhost:1"
    assert server._command[-2:] == ["--app-name", "basic-auth"] and secret not in " ".join(server._command)
    assert secret not in (settings := (home / "mlflow" / "auth.ini").read_text())
    assert "default_permission = NO_PERMISSIONS" in settings
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "one of my own")
    assert credentials.mlflow_environment()["MLFLOW_AUTH_ADMIN_PASSWORD"] == "one of my own"
    assert (home / "mlflow" / "auth.ini").read_text() != settings  # else the old password would count


def test_files_of_other_peoples_experiments_go_into_the_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def destination() -> str:
        return mlflow_process(1, "sqlite:///x")[0]._environment["MLFLOW_ARTIFACTS_DESTINATION"]

    assert destination() == (home / "mlflow" / "artifacts").as_uri()
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "s3://bucket/files")
    assert destination() == "s3://bucket/files"


def test_an_experiment_whose_files_are_elsewhere_is_left_to_the_server(
    home: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made before that, it would have them in the store."""
    (home / "mlflow").mkdir(parents=True, exist_ok=True)
    database = Path(shutil.copy(empty_database, home / "mlflow" / "mlflow.db"))
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{database}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for destination, expected in (("s3://bucket/files", set()), ((home / "mlflow" / "artifacts").as_uri(), {"lewis"})):
        monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", destination)
        mlflow_app._prepare()
        with closing(sqlite3.connect(database)) as connection:
            assert {name for [name] in connection.execute("SELECT name FROM experiments")} - {"Default"} == expected


def test_it_can_be_switched_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_MLFLOW_AUTH", "0")
    server, _ = mlflow_process(1, "sqlite:///x")
    assert "--app-name" not in server._command and "MLFLOW_AUTH_ADMIN_PASSWORD" not in server._environment
    assert not MLFLOW_PASSWORD.path().exists()
    monkeypatch.setenv("LEWIS_MLFLOW_AUTH", "no")
    with pytest.raises(InputError, match="LEWIS_MLFLOW_AUTH: expected 0 or 1, got 'no'"):
        settings.MLFLOW_AUTH.get()


def test_a_server_without_a_password_is_ours_all_the_same(
    home: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's command takes no name of an application but its own."""
    from mlflow import server
    from mlflow.tracking._model_registry import utils

    begun = list[str]()

    def become(command: Sequence[str], **_: object) -> None:
        begun.extend(command)
        sys.exit()

    monkeypatch.setattr(server, "_find_app", server._find_app)  # so that the teardown undoes what is set
    monkeypatch.setattr(server, "_exec_cmd", server._exec_cmd)
    monkeypatch.setattr(utils, "_registry_uri", utils._registry_uri)
    monkeypatch.setattr(mlflow_app, "_become", become)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{shutil.copy(empty_database, home.with_name('m.db'))}")
    monkeypatch.setenv(mlflow_app.ORIGINS, "http://127.0.0.1:1")
    monkeypatch.setattr(sys, "argv", ["mlflow_app", "--port", "1"])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit):
        mlflow_app.main()
    assert "lewis_flows.service.mlflow_app:open_to_all" in begun and "--factory" in begun


def test_what_answers_at_the_address_of_a_killed_service_does_not_get_its_key(
    home: Path, healthy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_URL", credentials.PREFECT_SENT, "MLFLOW_TRACKING_URI", "LEWIS_MLFLOW_UI"):
        monkeypatch.setenv(name, "")  # so that the teardown undoes what is set
        monkeypatch.delenv(name)
    key, url = PREFECT_KEY.read(), f"{healthy}/api"
    note.write({"prefect": url, "mlflow": healthy})
    assert servers.client_environment()[credentials.PREFECT_SENT] == key
    place = store.writer().rpartition("-")[0]
    store.write_json(home / "service.json", {**note.read(), "writer": f"{place}-{1 << 22}"})
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert not {"PREFECT_API_URL", credentials.PREFECT_SENT} & servers.client_environment().keys()


def test_a_service_of_before_a_restart_of_this_host_is_dead(home: Path) -> None:
    """Its boot differs, so it was taken for one elsewhere that lives: its key went to what had its port since."""
    running = {"blue": slots.Running("a", "http://127.0.0.1:2")}
    slots.note(slots.Now("0123456789ab-1", "http://127.0.0.1:1", "vllm", running))
    note.write({"prefect": "http://127.0.0.1:3/api"})
    files = [home / "service.json", home / "champion-now.json"]
    known = [store.read_json(path) for path in files]
    host, _, boot = store.system().partition("-")
    for system, alive in (
        (f"{host}-{boot}", True),  # such as in a container
        (f"{host}-0", False),
        (f"0123456789ab-{boot}", True),
        ("0123456789ab-0", True),
        ("", True),  # it knows no boot
    ):
        for path, content in zip(files, known, strict=True):
            store.write_json(path, {**content, "writer": "0123456789ab-1", "system": system})
        assert bool(note.read()) is slots.is_ours("http://127.0.0.1:2/v1") is alive, system


@pytest.mark.parametrize("made", ["", "CREATE TABLE users (id)"], ids=["empty", "no user yet"])
def test_a_first_start_that_was_killed_does_not_stop_the_next(home: Path, made: str) -> None:
    """MLflow makes each table again if it does not find all of them, and fails if one is there."""
    users = users_of(credentials.mlflow_environment())
    with closing(sqlite3.connect(users)) as connection:
        connection.execute(made)
    assert users.exists() and users_of(credentials.mlflow_environment()) == users
    assert not users.exists()
    with closing(sqlite3.connect(users)) as connection, connection:
        connection.execute("CREATE TABLE users (id)")
        connection.execute("INSERT INTO users VALUES (1)")
    credentials.mlflow_environment()
    assert users.exists()


def test_users_that_cannot_be_read_now_are_not_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that another process had locked was taken for one without users."""
    users = users_of(credentials.mlflow_environment())
    with closing(sqlite3.connect(users, isolation_level=None)) as other:
        other.execute("CREATE TABLE users (id)")
        other.execute("INSERT INTO users VALUES (1)")
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0))
        with pytest.raises(LewisError, match="users cannot be read: database is locked"):
            credentials.mlflow_environment()
    assert users.exists()


def users_of(environment: dict[str, str]) -> Path:
    settings = configparser.ConfigParser()
    settings.read(environment["MLFLOW_AUTH_CONFIG_PATH"])
    return Path(settings["mlflow"]["database_uri"].removeprefix("sqlite:///"))


class TestFind:
    """Commands whose `MLFLOW_TRACKING_URI` names a server."""

    @pytest.fixture(autouse=True)
    def served(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.setenv(name, "")  # so that the teardown undoes what is found
        note.write({"mlflow": "http://127.0.0.1:5000", "mlflow_user": "lewis"})

    def found(self, url: str) -> list[str]:
        os.environ["MLFLOW_TRACKING_URI"] = url
        credentials.find()
        return [os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]]

    def test_that_of_lewis_up_gets_our_password(self) -> None:
        assert self.found("http://127.0.0.1:5000/") == ["", ""]  # `lewis up` has another than this store's
        secret = MLFLOW_PASSWORD.read()
        assert self.found("http://127.0.0.1:5000/") == ["lewis", secret]

    def test_another_does_not(self) -> None:
        MLFLOW_PASSWORD.read()
        assert self.found("http://mlflow.example.org:5000") == ["", ""]

    def test_nor_one_that_lewis_up_was_told_to_use(self) -> None:
        MLFLOW_PASSWORD.read()
        note.write({"mlflow": "http://mlflow.example.org:5000"})
        assert self.found("http://mlflow.example.org:5000") == ["", ""]

    def test_what_is_given_counts_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        MLFLOW_PASSWORD.read()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        assert self.found("http://127.0.0.1:5000") == ["ann", ""]


def test_a_worker_has_no_secret_that_its_runs_do_not_need(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*worker.NOT_FOR_RUNS, "HF_TOKEN", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "s3cret")
    started = list[list[str]]()
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(worker.environment, "prepare", lambda: None)
    worker.main()
    assert started and {"LEWIS_WEBHOOK_SECRET", "LEWIS_METRICS_KEY", "LEWIS_NOTIFY_URL"} <= set(worker.NOT_FOR_RUNS)
    kept = {name for name, value in os.environ.items() if value == "s3cret"}
    assert kept >= {"HF_TOKEN", "PREFECT_API_AUTH_STRING"} and not kept & set(worker.NOT_FOR_RUNS)


class TestEnv:
    """`lewis env`, as a shell reads it."""

    def printed(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
        command = [sys.executable, "-c", "from lewis_flows.cli.main import main; raise SystemExit(main(['env']))"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        script = f"{done.stdout}\nenv -0"
        shown = subprocess.run(["sh", "-c", script], env={}, capture_output=True, text=True, check=True).stdout
        known = dict(line.split("=", 1) for line in shown.split("\0") if line)
        return {name: value for name, value in known.items() if name.startswith(("MLFLOW_", "PREFECT_"))}

    def test_without_a_service_it_names_the_database(self, home: Path) -> None:
        note.write({"prefect": "http://127.0.0.1:9/api", "mlflow": "http://127.0.0.1:9"})  # a service that was killed
        assert self.printed() == {"MLFLOW_TRACKING_URI": tracking.database()}

    def test_with_one_it_names_servers_and_what_they_ask_for(self, home: Path, healthy: str) -> None:
        note.write({"prefect": f"{healthy}/api", "mlflow": healthy, "mlflow_user": "lewis"})
        secret = MLFLOW_PASSWORD.read()
        assert self.printed() == {
            "MLFLOW_TRACKING_URI": healthy,
            "MLFLOW_TRACKING_USERNAME": "lewis",
            "MLFLOW_TRACKING_PASSWORD": secret,
            "PREFECT_API_URL": f"{healthy}/api",
            "PREFECT_API_AUTH_STRING": PREFECT_KEY.read(),
        }
