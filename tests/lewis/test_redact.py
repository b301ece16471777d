"""No password gets into a message or a log, whichever library wrote the URL that it is in."""

import io
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from lewis.errors import InputError, LewisError, RecipeError, TransientError
from lewis.redact import redact_logs, redacted, visible
from lewis.registry import tracking
from lewis_flows.service.status import status


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MLflow at postgresql://joe:hunter2@db:5432/mlflow: down", "MLflow at postgresql://***@db:5432/mlflow: down"),
        ("https://hf_token@hub.example/api", "https://***@hub.example/api"),
        ("mysql+pymysql://joe:p/w@ss@db/x", "mysql+pymysql://***@db/x"),
        ("('http://a:b@h1/', 'http://c:d@h2/')", "('http://***@h1/', 'http://***@h2/')"),
        ("http://h/x?token=abc&page=2", "http://h/x?token=***&page=2"),
        ("http://h/x?a=1&X-Amz-Signature=ab%20c#end", "http://h/x?a=1&X-Amz-Signature=***#end"),
        ("http://127.0.0.1:4200/api and org/name@main", "http://127.0.0.1:4200/api and org/name@main"),
        ("http://127.0.0.1:4200/org/name@main", "http://127.0.0.1:4200/org/name@main"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("org/name@main+other: a=b", "org/name@main+other: a=b"),
    ],
)
def test_what_is_before_the_at_sign_and_secret_parameters_are_hidden(text: str, expected: str) -> None:
    assert redacted(text) == expected == redacted(redacted(text))


def test_control_characters_can_be_read() -> None:
    assert visible("a\tb\r\nc\x1b]0;title\x07\x9b2J\rd") == "a\tb\r\nc\\x1b]0;title\\x07\\x9b2J\\x0dd"


@pytest.mark.parametrize("kind", [LewisError, InputError, TransientError, RecipeError])
def test_errors_hide_it_themselves(kind: type[LewisError]) -> None:
    error = kind("http://joe:hunter2@host refuses")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "http://***@host refuses"
    if isinstance(error, RecipeError):
        assert error.problems == ("http://***@host refuses",)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a library's logger writes."""
    before, stream = logging.getLogRecordFactory(), io.StringIO()
    logger, handler = logging.getLogger("some.library"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    redact_logs()
    redact_logs()  # twice is once
    yield stream
    logger.removeHandler(handler)
    logging.setLogRecordFactory(before)


def test_what_libraries_log_is_hidden_too(log: io.StringIO) -> None:
    logger = logging.getLogger("some.library")
    logger.warning("POST %s failed %d times", "http://joe:hunter2@host/x?api_key=k3y", 3)
    try:
        raise ValueError("http://joe:hunter2@host") from OSError("http://joe:hunter2@proxy")
    except ValueError:
        logger.exception("it failed")
    said = log.getvalue()
    assert "POST http://***@host/x?api_key=*** failed 3 times" in said and "ValueError: http://***@host" in said
    assert "hunter2" not in said and "k3y" not in said


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("uri", ["http://joe:hunter2@127.0.0.1:9/", "oracle://joe:hunter2@127.0.0.1:9/x"])
def test_a_tracking_uri_is_shown_without_its_password(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(LewisError, match=r"MLflow at \w+://\*\*\*@127.0.0.1:9/") as caught, tracking.client("asking"):
        pass
    assert "hunter2" not in str(caught.value)


def test_the_status_shows_no_password(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "recipes").mkdir(parents=True)
    monkeypatch.setenv("LEWIS_RECIPES", str(home / "recipes"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://joe:hunter2@db/mlflow")
    monkeypatch.setenv("PREFECT_API_URL", "http://joe:hunter2@127.0.0.1:9/api")
    said = status().model_dump_json()
    assert "hunter2" not in said and "postgresql://***@db/mlflow" in said and "http://***@127.0.0.1:9/api" in said
