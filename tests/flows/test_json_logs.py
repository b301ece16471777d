"""Logs as objects: one setting for Prefect's processes, the receiver and the commands."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import prefect.logging
import pytest
from prefect.logging.configuration import load_logging_config
from prefect.logging.handlers import PrefectConsoleHandler

from lewis_flows import environment, json_logs
from lewis_flows.cli import terminal
from lewis_flows.cli.main import main
from lewis_flows.service import worker

KEYS = {"time", "level", "logger", "line"}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Commands and the worker set variables of this process, which the tests after these must not have."""
    with patch.dict(os.environ):
        os.environ.pop(json_logs.CONSOLE, None)
        yield


def record(name: str, text: str, **more: object) -> logging.LogRecord:
    found = logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)
    found.__dict__.update(more)
    return found


@pytest.mark.parametrize(
    "made, expected",
    [
        (record("lewis.models.hub.repository", "two\nlines"), {"line": "two\nlines"}),
        (
            record("prefect.flow_runs", "ends", flow_run_name="merge tiny", flow_run_id="f1"),
            {"line": "Flow run 'merge tiny' - ends", "flow_run": "f1"},
        ),
        (
            record("prefect.task_runs", "waits", task_run_name="merge", task_run_id="t1", flow_run_id="f1"),
            {"line": "Task run 'merge' - waits", "flow_run": "f1", "task_run": "t1"},
        ),
        (record("lewis", "at postgresql://me:secret@db/x"), {"line": "at postgresql://***@db/x"}),
    ],
)
def test_a_record_is_one_line(made: logging.LogRecord, expected: dict[str, str]) -> None:
    printed = io.StringIO()
    json_logs.JsonLines(printed).emit(made)
    (line,) = printed.getvalue().splitlines()
    found = json.loads(line)
    assert found.keys() == KEYS | expected.keys() and found["level"] == "WARNING"
    assert {key: found[key] for key in expected} == expected


def test_an_error_has_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("tests.json")
    logger.addHandler(handler := json_logs.JsonLines())
    try:
        raise OSError("disk")
    except OSError:
        logger.exception("it failed")
    finally:
        logger.removeHandler(handler)
    found = json.loads(capsys.readouterr().err)
    assert found["error"].startswith("Traceback") and found["error"].endswith("OSError: disk")


@pytest.mark.parametrize("value, handler", [("json", json_logs.JsonLines), ("", PrefectConsoleHandler)])
def test_prefect_takes_the_handler(value: str, handler: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_LOG_FORMAT", value)
    environment.prepare()
    config = load_logging_config(Path(prefect.logging.__file__).with_name("logging.yml"))["handlers"]["console"]
    module, _, name = config.pop("class").rpartition(".")
    assert getattr(sys.modules[module], name) is handler
    made = handler(**{key: value for key, value in config.items() if key not in ("formatter", "stream")})
    assert isinstance(made, logging.StreamHandler)


def test_commands_say_their_errors_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["plan", "/nowhere.yaml"]
    assert main(wrong) == 2 and capsys.readouterr().err.startswith("lewis: /nowhere.yaml")
    monkeypatch.setenv("LEWIS_LOG_FORMAT", "json")
    assert main(wrong) == 2
    found = json.loads(capsys.readouterr().err)
    assert found.keys() == KEYS and found["level"] == "ERROR" and found["line"].startswith("/nowhere.yaml")
    monkeypatch.setenv("LEWIS_LOG_FORMAT", "yaml")
    assert main(wrong) == 2 and "expected text or json, got 'yaml'" in capsys.readouterr().err


def test_show_log_prints_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = list[logging.Handler]()
    monkeypatch.setattr(logging, "basicConfig", lambda **given: handlers.extend(given["handlers"]))
    monkeypatch.setenv("LEWIS_LOG_FORMAT", "json")
    terminal.show_log()
    monkeypatch.delenv("LEWIS_LOG_FORMAT")
    terminal.show_log()
    assert [type(each) for each in handlers] == [json_logs.JsonLines, terminal.Terminal]


def test_the_worker_is_prefects_with_our_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became = list[list[str]]()
    monkeypatch.setattr(os, "execv", lambda program, arguments: became.append(arguments))
    monkeypatch.setattr(sys, "argv", ["worker", "--limit", "2"])
    monkeypatch.setenv("LEWIS_LOG_FORMAT", "json")
    worker.main()
    assert became[0][1:] == ["-m", "prefect", "worker", "start", "--pool", "lewis", "--type", "process", "--limit", "2"]
    assert os.environ[json_logs.CONSOLE] == "lewis_flows.json_logs.JsonLines"
    assert worker.command(["--pool", "scoring"])[2:] == ["worker", "start", "--type", "process", "--pool", "scoring"]
    assert [worker.command([each]).count("--pool") for each in ("-p", "--pool=scoring", "--limit")] == [0, 0, 1]
    monkeypatch.setenv("LEWIS_LOG_FORMAT", "xml")
    assert worker.main() == 2 and len(became) == 1
