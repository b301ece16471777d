"""What the receiver misses is found out, told by name alone, and not asked for at every request."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from starlette.testclient import TestClient

from lewis_flows.service import receiver, webhook
from lewis_flows.service.receiver import Readiness

URL = "http://127.0.0.1:9/api"


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the Prefect server answer with a status; gives the headers of the requests."""
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    asked = list[dict[str, str]]()

    def answers(status: int | Exception) -> list[dict[str, str]]:
        def get(url: str, headers: dict[str, str], timeout: float) -> httpx.Response:
            assert url == f"{URL}/admin/version" and timeout < 5
            asked.append(headers)
            if isinstance(status, Exception):
                raise status
            return httpx.Response(status)

        monkeypatch.setattr(httpx, "get", get)
        return asked

    with temporary_settings({PREFECT_API_URL: URL, PREFECT_API_AUTH_STRING: "admin:secret"}):
        yield answers


@pytest.mark.parametrize(
    "status, missing, why",
    [
        (200, [], ""),
        (401, ["prefect"], "it refuses the key"),
        (500, ["prefect"], "status 500"),
        (httpx.ConnectError("refused"), ["prefect"], "does not answer (ConnectError)"),
    ],
)
def test_the_server_and_its_key(
    answer: Callable[..., Any], status: Any, missing: list[str], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked, readiness = answer(status), Readiness()
    assert readiness.missing() == readiness.missing() == missing
    assert asked == [{"Authorization": f"Basic {base64.b64encode(b'admin:secret').decode()}"}]  # once: it is kept
    assert why in caplog.text and "secret" not in caplog.text


def test_anyone_is_told_names_alone_and_what_is_back_is_seen(
    answer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(200)
    monkeypatch.setattr(receiver, "KEPT", 0.0)
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "none"))
    with TestClient(webhook.create_app("s")) as client:
        found = client.get("/health/ready")
        assert (found.status_code, found.json()) == (503, {"status": "not ready", "missing": ["recipes"]})
        assert client.get("/health").status_code == client.get("/health/live").status_code == 200
        monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
        assert client.get("/health/ready").json() == {"status": "ready", "missing": []}
