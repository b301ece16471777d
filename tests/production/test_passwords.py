"""MLflow's server with passwords, as `lewis up` starts it: who has none, or a wrong one, gets nothing."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lewis.errors import InputError
from lewis.registry import tracking
from lewis.store.secrets import MLFLOW_PASSWORD
from lewis_flows.service import credentials
from lewis_flows.service.processes import free_port
from lewis_flows.service.servers import mlflow_process

PAGES = (
    "/",
    "/api/2.0/mlflow/experiments/get-by-name?experiment_name=lewis",
    "/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=lewis",
    "/api/2.0/mlflow-artifacts/artifacts?path=0",
    "/get-artifact?path=x&run_id=1",
    "/graphql",
)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_mlflow_asks_for_the_password(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the server puts files of experiments that are made through it
    server, url = mlflow_process(free_port(), f"sqlite:///{home}/mlflow/mlflow.db")
    server.start()
    try:
        assert {page: status(url + page) for page in PAGES} == dict.fromkeys(PAGES, 401)
        assert status(f"{url}/health") == 200  # which tells nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with pytest.raises(InputError, match="no user was refused"), tracking.client("x"):
            pass
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", credentials.MLFLOW_USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", MLFLOW_PASSWORD.read() + "x")
        with (
            pytest.raises(InputError, match=f"the password of {credentials.MLFLOW_USER} was refused"),
            tracking.client("x"),
        ):
            pass
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", MLFLOW_PASSWORD.read())
        with tracking.client("x") as client:
            run = client.create_run(tracking.experiment(client))
            client.log_text(run.info.run_id, "text", "file.txt")
            assert client.list_artifacts(run.info.run_id)[0].path == "file.txt"
    finally:
        server.stop()
