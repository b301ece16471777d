"""A person approves a version on Prefect's page, or on the command line; the reason stays in the history."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from lewis.evaluation.gate import Verdict
from lewis.registry import history, outbox, promotion
from lewis_flows.approve import approve_flow
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.support.lineage import registered


@pytest.fixture
def client(prefect_url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    settings: dict[Any, Any] = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


def test_a_run_or_a_command_approves_or_refuses(
    client: SyncPrefectClient, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(digit: str, champion: str) -> None:
        version = registered(family.base, digit, {}, "asked", None)
        promotion.promote(version, Verdict(True, ("a rule: pass",), champion, approve_hours=1.0))

    asked("a", "base")
    state = approve_flow("asked", 1, "it is the first", return_state=True)
    run = client.read_flow_run(state.state_details.flow_run_id)
    assert (state.name, state.message) == ("Approved", "models:/asked/1 is the champion")
    assert {"verdict:approved", "trigger:hand"} <= set(run.tags) and run.name == "approve asked/1"

    asked("b", "models:/asked/1")
    assert main(["approve", "asked/2", "--why", "support has read it", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"champion": "models:/asked/2", "before": "models:/asked/1"}

    asked("c", "models:/asked/2")
    state = approve_flow("asked", 1, "again", return_state=True)
    assert state.is_failed() and "it waits for no approval" in str(state.message)
    assert main(["approve", "models:/asked/3", "--why", "it is rude", "--refuse"]) == 0
    told = [(each.what, each.version[-1], each.why) for each in history.history("asked") if each.what != "waits"]
    assert told == [
        ("approved", "1", "it is the first"),
        ("approved", "2", "support has read it"),
        ("refused", "3", "it is rude"),
    ]
    assert history.history("asked")[1].by.startswith("the run http")
    assert [move.version for move in outbox.moves()] in ([], ["2"], ["1", "2"])  # told, or to be told soon
