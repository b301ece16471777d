"""The password of an MLflow server that is started here, and what a server says that wants another."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lewis.errors import InputError
from lewis.registry import tracking
from lewis_flows.service import mlflow_key
from lewis_flows.service.servers import mlflow_process


@pytest.fixture
def refusing() -> Iterator[str]:
    """The URL of a server that knows nobody."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"You are not authenticated.")

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
    monkeypatch.setenv("LEWIS_MLFLOW_AUTH", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    server, _ = mlflow_process(1, "sqlite:///x")
    secret = mlflow_key.password()
    assert mlflow_key.path().stat().st_mode & 0o77 == 0
    assert server._environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == secret
    assert server._environment["MLFLOW_BACKEND_STORE_URI"] == "sqlite:///x"
    assert server._command[-2:] == ["--app-name", "basic-auth"] and secret not in " ".join(server._command)
    assert secret not in (settings := (home / "mlflow" / "auth.ini").read_text())
    assert "default_permission = NO_PERMISSIONS" in settings
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "one of my own")
    assert mlflow_key.server_environment()["MLFLOW_AUTH_ADMIN_PASSWORD"] == "one of my own"
    assert (home / "mlflow" / "auth.ini").read_text() != settings  # else the old password would count


def test_files_of_other_peoples_experiments_go_into_the_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def destination() -> str:
        return mlflow_process(1, "sqlite:///x")[0]._environment["MLFLOW_ARTIFACTS_DESTINATION"]

    assert destination() == (home / "mlflow" / "artifacts").as_uri()
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "s3://bucket/files")
    assert destination() == "s3://bucket/files"


def test_it_is_off_by_default_and_told_what_it_needs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not mlflow_key.wanted() and "--app-name" not in mlflow_process(1, "sqlite:///x")[0]._command
    monkeypatch.setenv("LEWIS_MLFLOW_AUTH", "yes")
    with pytest.raises(InputError, match="LEWIS_MLFLOW_AUTH: expected 0 or 1, got 'yes'"):
        mlflow_key.wanted()
    monkeypatch.setenv("LEWIS_MLFLOW_AUTH", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="install the extra `auth`"):
        mlflow_key.wanted()
