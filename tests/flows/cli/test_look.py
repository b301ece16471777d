"""`lewis open`, `lewis logs` and `lewis cancel`: the pages, the log and the end of runs."""

import html
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

import prefect
import pytest
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import LogCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed, Running, Scheduled, State
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from lewis.evaluation.gate import Verdict
from lewis.registry import promotion, versions
from lewis.store.secrets import MLFLOW_PASSWORD, PREFECT_KEY
from lewis_flows.cli.main import main
from lewis_flows.service import note
from lewis_flows.service.recipe_deployments import TAG
from lewis_flows.service.servers import RECIPES, check_mlflow_as_served
from lewis_flows.service.sign_in import SignIn, make_code
from tests.conftest import Family
from tests.support.lineage import registered


@pytest.fixture
def client(prefect_url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    settings: dict = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


@task(task_run_name="measure math")
def _slow() -> None:
    """Stands for a step."""


@flow(name="merge")
def _merge(recipe: str) -> State:
    """Stands for the merge."""
    create_markdown_artifact("# told", key="looked-at-run-report")
    _slow()
    return Completed(name="Promoted", message="v2: acc 0.9 vs 0.8; in place of v1")


_LOOKS = ("report nope", "pull nope -o out", "history nope", "history nope --plot x.png")
_MOVES = (
    "promote nope/1 --why x",
    "approve nope/1 --why x",
    "approve nope/1 --refuse --why x",
    "rollback nope --why x",
)


@pytest.mark.parametrize("command", _LOOKS + _MOVES)
def test_a_look_at_an_empty_store_creates_no_database(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("lewis: nope: ") and "expected one of" not in message
    assert not (tmp_path / "store" / "mlflow").exists()


@pytest.mark.parametrize("command", ["gc --yes", "retention --yes", *_MOVES, "run ours.yaml"])
def test_a_shell_with_another_mlflow_than_the_service_is_refused(
    command: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gc --yes` over ssh, where only the service's unit had MLFLOW_TRACKING_URI, removed what the champion needs.

    `run` would have registered where the service never looks.
    """
    monkeypatch.chdir(tmp_path)
    Path("ours.yaml").write_text("{merge_method: linear, models: [{model: org/math, parameters: {weight: 1}}]}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # to which MLflow has set it
    note.write({"mlflow": "http://me:secret@mlflow:5000"})
    assert main(command.split()) == 2
    message = capsys.readouterr().err
    assert "has http://***@mlflow:5000, and by this environment it is" in message
    assert "set MLFLOW_TRACKING_URI" in message
    own = {"mlflow": "http://127.0.0.1:5000", note.database_of("mlflow"): str(home / "mlflow" / "mlflow.db")}
    for uri in ("", "http://127.0.0.1:5000/"):
        note.write(own)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        check_mlflow_as_served()


@pytest.mark.parametrize("command", ["report nope", "deploy", "cancel nope"])
def test_a_prefect_server_that_does_not_answer_is_reported_without_a_traceback(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert main(command.split()) == 1
    why = "it failed: http://127.0.0.1:9/api: Prefect does not answer (ConnectError); see that it is up, or unset PREF"
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_a_url_that_is_malformed_is_named(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "http://lewis:sesame@[::1")
    assert main(["served"]) == 2
    assert f"{name}: expected a URL, got 'http://***@[::1': Invalid IPv6 URL; correct it" in capsys.readouterr().err


def test_the_pages_and_the_log_of_the_last_run(
    client: SyncPrefectClient,
    prefect_url: str,
    tmp_path: Path,
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setenv("LEWIS_RECIPES", str(folder))
    path = folder / "looked at.yaml"
    path.write_text("{merge_method: ties, base_model: b, models: [{model: a}], register: {name: looked}}")
    assert main(["logs", "looked at"]) == 1
    assert "Prefect knows no run of this recipe" in capsys.readouterr().err
    assert main(["open", str(path)]) == 0
    assert re.search(r"^run +none yet\nversion +none yet$", capsys.readouterr().out, re.MULTILINE)

    first, second = (registered(family.base, digit, {}, "looked", None) for digit in "ab")
    promotion.promote(first, Verdict(True, (), "base"))
    versions.tag(first, {"lewis.published": "org/looked@1"})
    client.create_flow_run(_merge, parameters={"recipe": "another"}, state=Running())
    done = _merge(str(path), return_state=True)
    run = done.state_details.flow_run_id
    lines = [(logging.INFO, "downloading"), (logging.WARNING, "a slow disk"), (logging.DEBUG, "detail")]
    now = datetime.now(UTC)
    client.create_logs(
        [LogCreate(name="lewis", level=level, message=text, timestamp=now, flow_run_id=run) for level, text in lines]
    )
    of_run, deadline = FlowRunFilter.model_validate({"id": {"any_": [run]}}), time.monotonic() + 120
    while not (tasks := client.read_task_runs(flow_run_filter=of_run)) and time.monotonic() < deadline:
        time.sleep(0.1)  # the server learns of tasks by their events
    told_by = {"name": "lewis", "level": logging.INFO, "flow_run_id": run, "task_run_id": tasks[0].id}
    client.create_logs(
        [LogCreate(message=text, timestamp=now, **told_by) for text in ("a long pass", "measure math: 40 %")]
    )

    assert main(["open", "looked at", "--json"]) == 0
    found, ui = json.loads(capsys.readouterr().out), prefect_url.removesuffix("/api")
    assert (found["state"], found["message"]) == ("Promoted", "v2: acc 0.9 vs 0.8; in place of v1")
    assert found["run"] == f"{ui}/runs/flow-run/{run}"
    assert found["artifacts"]["looked-at-run-report"].startswith(f"{ui}/artifacts/artifact/")
    assert (found["version"], found["champion"]) == (second.uri, first.uri)
    assert "/#/models/looked/versions/1?" in found["champion_page"] and found["published"] == "org/looked@1"
    assert main(["open", "looked at"]) == 0
    told = capsys.readouterr().out
    assert f"run                   Promoted: {found['message']}\n                      {found['run']}\n" in told

    monkeypatch.setenv("LEWIS_MLFLOW_UI", "x")  # so that the teardown undoes what the command sets
    monkeypatch.delenv("LEWIS_MLFLOW_UI")
    password = MLFLOW_PASSWORD.read()
    note.write({"prefect": prefect_url, "mlflow": "http://127.0.0.1:5001", "mlflow_user": "lewis"})
    assert main(["open", "looked at"]) == 0
    told = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://lewis:sesame@127.0.0.1:5001")
        assert main(["open", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pages"]["models"].startswith("http://***@127.0.0.1:5001/#/models")
    assert (
        "http://127.0.0.1:5001/#/models/looked/versions/2?workflowType=machine_learning\n" in told
        and password not in told
    )
    assert f"sign in               MLflow asks for user lewis and the password in {MLFLOW_PASSWORD.path()}\n" in told

    assert main(["logs", "looked at", "--level", "WARNING", "--json"]) == 0
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (line["level"], line["logger"], line["task"], line["message"]) == ("WARNING", "lewis", "", "a slow disk")
    assert main(["logs", "looked at", "--follow"]) == 0  # it has ended
    told = capsys.readouterr().out
    assert re.search(r"^\d\d:\d\d:\d\d WARNING a slow disk$", told, re.MULTILINE) and "detail" not in told
    assert "INFO    measure math | a long pass\n" in told and "INFO    measure math: 40 %\n" in told


def test_runs_that_go_on_or_wait_are_cancelled(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stopped.yaml").touch()
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    monkeypatch.setattr("lewis_flows.service.cancel.PATIENCE", 0.0)
    monkeypatch.setattr("lewis_tasks.support.flow_run.PAGE", 1)  # as if more runs waited than the server gives at once

    def run(name: str, state: State, **of: Any) -> UUID:
        return client.create_flow_run(_merge, name=name, parameters={"recipe": "stopped"}, state=state, **of).id

    deployment = client.create_deployment(client.create_flow(_merge), "merge-stopped")
    tonight = run("tonight", Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=9)))
    due = run("due", Scheduled(scheduled_time=datetime.now(UTC) - timedelta(seconds=1)))
    made = client.create_flow_run_from_deployment(deployment, parameters={"recipe": "stopped"}, name="goes on").id
    client.set_flow_run_state(made, Running(), force=True)
    assert main(["cancel", "stopped", "--json"]) == 1  # no worker is here to end the process
    told = {each["name"]: (each["state"], each["ended"]) for each in json.loads(capsys.readouterr().out)}
    assert told == {"due": ("Cancelled", True), "goes on": ("Cancelling", False)}
    assert client.read_flow_run(tonight).state_name == "Scheduled"
    client.set_flow_run_state(made, Completed(), force=True)
    assert main(["cancel", "stopped"]) == 0 and capsys.readouterr().out == "nothing runs or waits\n"

    run("by itself", Running())
    for what, words in {
        "by itself": "end that with Ctrl-C",
        "stoped": "did you mean",
        str(due): "lewis status",
    }.items():
        assert main(["cancel", what]) == 2 and words in capsys.readouterr().err.replace("\n", " ")
    client.delete_deployment(deployment)


def test_prefects_page_of_deployments_takes_the_filter_of_the_link() -> None:
    """Its parameters have the names of the properties that the page gives its menu of tags."""
    ((filtered, _),) = parse_qsl(urlsplit(RECIPES).query)
    scripts = Path(prefect.__ui_static_path__).glob("assets/index-*.js")
    assert any(f').{filtered},"onUpdate:selected"' in script.read_text() for script in scripts)


def test_the_pages_of_the_service(
    client: SyncPrefectClient, prefect_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note.write({"prefect": prefect_url, "mlflow": "http://127.0.0.1:5001"})
    assert main(["open", "--json"]) == 0
    found, ui = json.loads(capsys.readouterr().out), prefect_url.removesuffix("/api")
    assert found["pages"] == {
        "deployments": f"{ui}/deployments?deployments.tags.name={TAG}",
        "runs": f"{ui}/runs",
        "recipes": f"{ui}/artifacts/key/recipes",
        "models": "http://127.0.0.1:5001/#/models?workflowType=machine_learning",
    }
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    key = PREFECT_KEY.read()
    PREFECT_KEY.path().touch()  # as where `lewis up` made it
    assert main(["open", "--no-browser"]) == 0 and not opened
    assert main(["open"]) == 0 and key not in capsys.readouterr().out
    (file,) = (Path(urlsplit(each).path) for each in opened)
    assert file.stat().st_mode & 0o077 == 0 and key not in file.read_text()
    address = html.unescape(re.findall('url=(.*)"', file.read_text())[0])
    assert address.startswith(f"{ui}/lewis/sign-in?code=")
    assert address.endswith("&to=/deployments%3Fdeployments.tags.name%3Dlewis")

    app = SignIn(PlainTextResponse("Prefect"), key)
    browser = TestClient(app, base_url=ui)
    path = address.removeprefix(ui)
    assert browser.get(path.replace("code=", "code=1")).status_code == browser.post(path).status_code == 403
    page = browser.get(path)
    assert json.dumps(key) in page.text and '"/deployments?deployments.tags.name=lewis"' in page.text
    assert page.headers["cache-control"] == "no-store"
    assert browser.get(path).status_code == 403  # once
    for to in ("//evil.example", "https://evil.example", "/\\\\evil.example"):
        assert "evil" not in browser.get("/lewis/sign-in", params={"code": make_code(key), "to": to}).text
    assert browser.get("/runs").text == "Prefect"
    monkeypatch.setattr("time.time", lambda: 0.0)
    old = make_code(key)
    monkeypatch.undo()
    assert browser.get("/lewis/sign-in", params={"code": old}).status_code == 403
    assert TestClient(SignIn(PlainTextResponse("Prefect"), "")).get("/lewis/sign-in").text == "Prefect"
