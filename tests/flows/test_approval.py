"""A person approves a version on the page of its run, or on the command line; the reason stays in the history."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import pytest
from prefect import State, flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import AwaitingRetry, Cancelled

from lewis.errors import TransientError
from lewis.evaluation.gate import Verdict
from lewis.registry import history, outbox, promotion, tracking
from lewis.reports.run_report import AWAITS
from lewis_flows import approval, merge, prefect_runs, watch
from lewis_flows.cli.main import main
from lewis_flows.registration import MergeReport
from lewis_flows.service import automations
from lewis_tasks.support import events
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.failures import says_why
from tests.conftest import Family
from tests.support.lineage import registered


@pytest.fixture
def client(prefect_url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    settings: dict[Any, Any] = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


@flow(name=prefect_runs.MERGE, flow_run_name=merge.run_name)
@says_why
def _merge(version: str, recipe: str) -> State[Any]:
    """The end of a merge whose version waits."""
    run = run_tags.this_run()
    return approval.ask(run, approval.answered(run) or version, "* a rule: pass")


def _run(client: SyncPrefectClient, of: UUID) -> State[Any]:
    """As a worker does."""
    try:
        state: State[Any] = run_flow(_merge, flow_run=client.read_flow_run(of), return_type="state")
    except Pause as pause:
        state = pause.state
    return state


def _asks(
    client: SyncPrefectClient, family: Family, name: str, digit: str, champion: str, tags: tuple[str, ...] = ()
) -> UUID:
    """A run that waits for an answer about a new version of a model."""
    deployment = client.create_deployment(client.create_flow(_merge), name, enforce_parameter_schema=False)
    version = registered(family.base, digit, {}, name, None)
    promotion.promote(version, Verdict(True, ("a rule: pass",), champion, approve_hours=1.0))
    given = {"version": version.uri, "recipe": name}
    of = client.create_flow_run_from_deployment(deployment, parameters=given, tags=tags).id
    assert _run(client, of).name == "Suspended" and client.read_flow_run(of).name == f"merge {name}"
    return of


def test_a_run_waits_for_a_person_on_its_page_or_on_the_command_line(
    client: SyncPrefectClient, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    run, asks = partial(_run, client), partial(_asks, client, family, "asked")
    first = asks("a", "base")
    keyset = client.read_flow_run(first).state.state_details.run_input_keyset
    shown = client.read_flow_run_input(first, keyset["description"])
    assert "models:/asked/1" in str(shown) and "a rule: pass" in str(shown)
    client.update_flow_run(first, name="asked: first merge")  # as `rename` does
    resume_flow_run(first, run_input={"approve": True, "why": "it is the first"})
    state = run(first)
    assert client.read_flow_run(first).name == "asked: first merge"
    assert (state.name, state.message) == ("Approved", "models:/asked/1 is the champion: it is the first")
    assert "verdict:approved" in client.read_flow_run(first).tags
    # Retried, it merges what is newest: it asked again about its version, which is the champion.
    assert approval.answered(client.read_flow_run(first)) == "models:/asked/1"
    client.set_flow_run_state(first, AwaitingRetry())
    assert approval.answered(client.read_flow_run(first)) == ""
    client.set_flow_run_state(first, state, force=True)

    older, second = asks("b", "models:/asked/1"), asks("c", "models:/asked/1")
    assert client.read_flow_run(older).state_name == "Lapsed"
    assert main(["approve", "asked/3", "--why", "support has read it", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"champion": "models:/asked/3", "before": "models:/asked/1"}
    assert run(second).name == "Approved"

    third = asks("d", "models:/asked/3")
    resume_flow_run(third, run_input={"approve": False, "why": "it is rude"})
    assert run(third).name == "Refused"
    late = asks("e", "models:/asked/3")
    promotion.promote_by_hand("asked", "2", "in a hurry")
    resume_flow_run(late, run_input={"approve": True, "why": ""})
    state = run(late)
    assert state.is_failed() and "the champion is models:/asked/2 by now" in str(state.message)
    told = [(each.what, each.version[-1], each.why) for each in history.history("asked") if each.what != "waits"]
    assert told == [
        ("approved", "1", "it is the first"),
        ("approved", "3", "support has read it"),
        ("refused", "4", "it is rude"),
        ("promoted by hand", "2", "in a hurry"),
    ]
    assert history.history("asked")[1].by.startswith("the run http")
    assert {move.version for move in outbox.moves()} <= {"1", "2", "3"}  # told, or to be told soon


@pytest.mark.long
def test_a_heartbeat_after_the_question_does_not_end_the_run(
    client: SyncPrefectClient, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 150 runs was Crashed, and its form gone: its process sent a heartbeat while it saved the form."""
    monkeypatch.setattr(automations, "DEAD_AFTER", timedelta(seconds=10))
    automation = client.create_automation(next(automations._automations(client)))
    save = approval.Approval.save.__func__

    def saves(cls: type[approval.Approval], keyset: Any, *rest: Any) -> None:
        save(cls, keyset, *rest)
        (of,) = prefect_runs.of_flows(client, (prefect_runs.MERGE,), ("PAUSED",), name={"any_": ["merge beats"]})
        run = {"id": f"prefect.flow-run.{of.id}", "name": of.name}
        events.post("prefect.flow-run.heartbeat", run, {}, tags=of.tags)

    monkeypatch.setattr(approval.Approval, "save", classmethod(saves))
    try:
        of = _asks(client, family, "beats", "a", "base", (automations.TAG,))
        time.sleep(20)  # 10, and what the server takes to notice
        assert client.read_flow_run(of).state_name == "Suspended"
    finally:
        client.delete_automation(automation)


def test_an_answer_waits_for_mlflow(client: SyncPrefectClient, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run failed, and with it the answer was lost."""
    of = _asks(client, family, "away", "a", "base")
    waits = Mock(side_effect=[TransientError("MLflow does not answer"), True])
    monkeypatch.setattr(promotion, "is_waiting", waits)
    resume_flow_run(of, run_input={"approve": True, "why": "it is good"})
    state = _run(client, of)
    assert (state.name, state.message) == ("Approved", "models:/away/1 is the champion: it is good")


def test_a_question_stays_if_a_later_run_finds_nothing_new(
    client: SyncPrefectClient, family: Family, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each night, the run that a person was to answer ended as Lapsed: another one `asks about a newer version`."""
    (recipes / "again.yaml").write_text("{merge_method: ties, base_model: org/base, models: [{model: org/math}]}")
    first = _asks(client, family, "again", "a", "base")
    report = MergeReport(recipe="again", digest="a" * 64, folder=family.base, version="models:/again/1")
    deployment, changed = client.read_flow_run(first).deployment_id, False
    monkeypatch.setattr(merge, "_merge", lambda *_: (report, changed, (AWAITS, "v1: passed")))

    def states() -> list[str | None]:
        of = client.create_flow_run_from_deployment(deployment, parameters={"recipe": "again"})
        with suppress(Pause):
            run_flow(merge.merge_flow, flow_run=of, return_type="state")
        return [client.read_flow_run(run).state_name for run in (first, of.id)]

    assert states() == ["Suspended", "Cached"]
    changed = True  # such as the gate's reasons
    assert states() == ["Lapsed", "Suspended"]
    lapsed = client.read_flow_run(first).state
    assert lapsed and lapsed.message == "nobody answered; a later run asks about models:/again/1"


@pytest.mark.long
def test_a_question_ends_when_the_champion_is_moved_by_hand(client: SyncPrefectClient, family: Family) -> None:
    """Its run waited for ever."""
    asks = partial(_asks, client, family, "moved")

    def state(of: UUID) -> tuple[str | None, str | None]:
        found = client.read_flow_run(of).state
        assert found
        return found.name, found.message

    other = _asks(client, family, "unmoved", "0", "base")
    first = asks("a", "base")
    assert main(["promote", "models:/moved/1", "--why", "in a hurry"]) == 0
    ended = _run(client, first)
    assert (ended.name, ended.message) == ("Approved", "models:/moved/1 is the champion: in a hurry")

    second = asks("b", "models:/moved/1")
    registered(family.base, "c", {}, "moved")
    assert main(["promote", "moved/3", "--why", "in a hurry"]) == 0
    assert state(second) == ("Lapsed", "models:/moved/2 can no longer be approved; see `lewis history moved`")
    assert "verdict:lapsed" in client.read_flow_run(second).tags

    third = asks("d", "models:/moved/3")
    assert main(["rollback", "moved", "--why", "it was rude"]) == 0
    assert state(third)[0] == "Lapsed"
    assert state(other)[0] == "Suspended"
    assert main(["approve", "unmoved/1", "--refuse", "--why", "it is rude"]) == 0
    assert _run(client, other).name == "Refused"


def test_a_run_that_was_killed_before_it_had_its_form_ends_with_the_answer(
    client: SyncPrefectClient, family: Family
) -> None:
    """It waited for ever: without a form, Prefect resumes no run that waits for one."""
    of = _asks(client, family, "formless", "a", "base")
    state = client.read_flow_run(of).state
    assert state
    client.delete_flow_run_input(of, state.state_details.run_input_keyset["schema"])
    promotion.approve("formless", "1", "it is good")
    approval.settle("models:/formless/1", "it is good")
    ended = client.read_flow_run(of).state
    assert ended and (ended.name, ended.message) == ("Lapsed", "models:/formless/1 is the champion: it is good")


def test_a_model_whose_history_cannot_be_read_keeps_no_other_question_open(
    client: SyncPrefectClient, family: Family
) -> None:
    """Its tag, written by a person or a newer LEWIS on another machine, stopped the others too, in whatever order."""
    runs = [_asks(client, family, name, digit, "base") for name, digit in (("past", "a"), ("odd", "b"), ("over", "c"))]
    with tracking.client("a test") as registry:
        registry.set_registered_model_tag("odd", f"{history.TAG}2999", "{}")
        for name in ("past", "over"):
            registry.set_model_version_tag(name, "1", "lewis.approve_until", "2026-01-01")
    approval.settle()
    assert [client.read_flow_run(of).state_name for of in runs] == ["Lapsed", "Suspended", "Lapsed"]
    client.set_flow_run_state(runs[1], Cancelled(), force=True)


@pytest.mark.long
def test_a_poll_ends_what_waits_for_an_answer_that_was_given_while_no_service_ran(
    client: SyncPrefectClient, family: Family
) -> None:
    asks = partial(_asks, client, family)
    approved, refused = asks("given", "a", "base"), asks("refused", "b", "base")
    late, open_ = asks("late", "c", "base"), asks("open", "d", "base")
    promotion.approve("given", "1", "it is good")
    promotion.refuse("refused", "1", "it is rude")
    with tracking.client("a test") as registry:
        registry.set_model_version_tag("late", "1", "lewis.approve_until", "2026-01-01T00:00:00+00:00")
    watch.poll([])
    assert client.read_flow_run(late).state_name == "Lapsed"
    state = _run(client, approved)
    assert state.name == "Approved" and str(state.message).endswith("decided elsewhere; see `lewis history given`")
    assert _run(client, refused).name == "Refused"
    watch.poll([])
    assert client.read_flow_run(open_).state_name == "Suspended"
