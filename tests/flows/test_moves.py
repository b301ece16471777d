"""Prefect is told of every new champion at least once, and notifies once."""

import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.filters import EventFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import (
    AwaitingConcurrencySlot,
    Completed,
    Crashed,
    Failed,
    Late,
    Pending,
    Running,
    Scheduled,
    Suspended,
)

from lewis.registry import outbox
from lewis.registry.outbox import Move
from lewis_flows import release_event
from lewis_flows.service import automations
from lewis_flows.service.automations import SERVICE_TAG, put_automations
from lewis_tasks.support import events, moves
from tests.support.relays import Forgetful
from tests.support.service import Sink


@pytest.fixture
def client(prefect_url: str, home: Path) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        yield client


def move() -> Move:
    """One that happened, of a model of its own."""
    about = {"recipe": "nightly", "digest": "d" * 64, "flow_run": str(uuid.uuid4())}
    made = Move(f"tiny-{uuid.uuid4().hex[:6]}", "2", None, ["better"], about, happened=True)
    outbox.write(made)
    return made


def stored(client: SyncPrefectClient, wanted: Move) -> list[dict]:
    resource = {"id": [f"lewis.model.{wanted.name}"]}
    found = client.read_events(EventFilter.model_validate({"resource": resource}), limit=50).events
    assert {str(event.id) for event in found} <= {wanted.id}
    return [event.payload for event in found]


def test_a_move_stays_until_the_server_gives_its_event_back(client: SyncPrefectClient) -> None:
    told = move()
    moves.report()  # as in a task, which does not wait
    moves.report(patience=20)
    assert outbox.moves() == []
    (payload,) = stored(client, told)
    assert payload["uri"] == told.uri and payload["recipe"] == "nightly" and payload["reasons"] == ["better"]
    assert payload["previous"] is None and f"/#/models/{told.name}/versions/2" in payload["url"]


def test_a_server_that_dies_with_an_event_is_told_again(client: SyncPrefectClient, prefect_url: str) -> None:
    told = move()
    with Forgetful(prefect_url) as server, temporary_settings({PREFECT_API_URL: server.url}):
        moves.report(patience=1)
        assert server.taken == 1
    assert outbox.moves() == [told] and stored(client, told) == []
    moves.report(patience=20)
    assert outbox.moves() == [] and len(stored(client, told)) == 1


def test_without_a_server_it_is_told_later(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = move()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        moves.report(patience=1)
    assert outbox.moves() == [told] and "will be reported to Prefect later" in caplog.text


def test_what_nobody_took_for_a_week_is_given_up(client: SyncPrefectClient) -> None:
    outbox.write(replace(move(), time="2026-01-01T00:00:00+00:00"))
    moves.report()
    assert outbox.moves() == []


def test_it_stays_until_the_user_is_notified_and_he_is_notified_once(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Sink()
    monkeypatch.setenv("LEWIS_NOTIFY_URL", sink.url)
    put_automations(client)
    try:
        time.sleep(3)  # the server's triggers learn of the automation
        told = move()
        moves.report(patience=240)
        assert outbox.moves() == []
        words = f"{told.uri} is the champion now, the first one: better (recipe nightly)"
        assert [each["body"].partition("\n")[0] for each in sink.received] == [words]
        assert f"/#/models/{told.name}/versions/2?" in sink.received[0]["body"]

        outbox.write(told)  # its sender died before it had read that the server knows
        again = replace(told, id=str(uuid.uuid4()), version="3", about={})
        outbox.write(again)
        moves.report(patience=240)
        assert outbox.moves() == []
        bodies = [each["body"].partition("\n")[0] for each in sink.received]
        assert bodies == [words, f"{again.uri} is the champion now, the first one: better"]
    finally:
        for automation in client.read_automations():
            client.delete_automation(automation.id)


@flow(name="merge")
def _merge() -> None:
    """Stands for the merge in the server's records."""


@flow(name="retention")
def _retention() -> None:
    """Stands for the retention, which the next night repeats."""


@flow(name="verify")
def _verify() -> None:
    """Stands for the nightly check."""


def test_what_a_person_should_know_is_notified_with_a_link(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Sink()
    monkeypatch.setenv("LEWIS_NOTIFY_URL", sink.url)
    monkeypatch.setattr(events, "LONG", timedelta(0))
    monkeypatch.setattr(automations, "LONG", timedelta(seconds=10))  # the least that Prefect takes
    monkeypatch.setattr(automations, "STARTS_WITHIN", timedelta(seconds=10))
    put_automations(client)
    try:
        assert all(each.description for each in client.read_automations())
        time.sleep(3)  # the server's triggers learn of the automations
        late = {}
        for state in (Completed(name="Skipped"), AwaitingConcurrencySlot()):  # another run merges it; it takes its turn
            run = client.create_flow_run(_merge, name="merge seen", tags=["lewis"], state=Scheduled())
            for each in (Late(), state):
                client.set_flow_run_state(run.id, each, force=True)
        for of, name in ((_merge, "merge late"), (_merge, "merge late for a moment"), (_verify, "verify late")):
            run = client.create_flow_run(of, name=name, tags=["lewis"], state=Scheduled())
            client.set_flow_run_state(run.id, Late(), force=True)
            late[name] = run.id
        client.set_flow_run_state(late["merge late for a moment"], Running(), force=True)
        tags = [SERVICE_TAG]
        stuck_run, other = (client.create_flow_run(_retention, tags=tags, state=Scheduled()).id for _ in range(2))
        for run_id, states in ((stuck_run, [Pending()]), (other, [Pending(), Running()])):
            for each in states:
                client.set_flow_run_state(run_id, each, force=True)
        died = client.create_flow_run(_retention, name="retention", tags=["lewis"], state=Running())
        client.set_flow_run_state(died.id, Crashed(message="the next night does its work"), force=True)
        waits = Completed(name="AwaitingApproval", message="v4: acc 0.9; passed, waits for: lewis approve tiny/4")
        ends = {
            "LEWIS: a version waits for approval": waits,
            "LEWIS: a run died": Crashed(message="Its heartbeats stopped"),
            "LEWIS: a merge was rejected": Completed(name="Rejected", message="v2: acc 0.1 vs 0.2; a rule"),
            "LEWIS: a champion was not published": Failed(name="Unpublished", message="v3: acc 0.3; the Hub refuses"),
            "LEWIS: a run failed": Failed(message="org/math: gone"),
        }
        expected = {}
        for subject, state in ends.items():
            run = client.create_flow_run(_merge, name="merge tiny", tags=["lewis"], state=Running())
            client.set_flow_run_state(run.id, state, force=True)
            expected[subject] = f"merge tiny: {state.message}\n\nhttp://127.0.0.1:4200/runs/flow-run/{run.id}"
        tags = ["lewis", "awaits:models:/my chat/5"]
        asks = client.create_flow_run(_merge, name="merge chat", tags=tags, state=Running())
        client.set_flow_run_state(asks.id, Suspended(), force=True)
        question = "models:/my chat/5 passed its gate, and waits for an answer on the run's page"
        asked = f"merge chat: {question}\n\nhttp://127.0.0.1:4200/runs/flow-run/{asks.id}"
        of_others = client.create_flow_run(_merge, name="not ours", state=Running())
        client.set_flow_run_state(of_others.id, Failed(message="somebody else's"), force=True)
        for _ in range(2):  # each poll looks again, and the server knows the event
            release_event.announce_stuck("tiny", "org/math", "org/math", "1" * 40, "no space")
        stuck = "org/math 11111111 could not be merged into tiny, three times: no space"
        events.Wait().look("merge tiny", "a device slot, which search tiny holds since 14:02")
        waited = "merge tiny has waited 0 min for a device slot, which search tiny holds since 14:02"
        expected |= {"LEWIS: a release is not merged": stuck, "LEWIS: a run waits for long": waited}
        told = "merge late was due long ago: is there a worker, and has it time?"
        expected["LEWIS: a run is late"] = f"{told}\n\nhttp://127.0.0.1:4200/runs/flow-run/{late['merge late']}"
        deadline = time.monotonic() + 240
        while (ended := client.read_flow_run(stuck_run).state_name) != "Crashed" and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ended == "Crashed" and client.read_flow_run(other).state_name == "Running"
        wanted = sorted([*expected.items(), ("LEWIS: a version waits for approval", asked)])
        while len(sink.received) < len(wanted) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = [
            (each["subject"], re.sub(r"http://127.0.0.1:\d+", "http://127.0.0.1:4200", each["body"]))
            for each in sink.received
        ]
        assert sorted(found) == wanted
    finally:
        for automation in client.read_automations():
            client.delete_automation(automation.id)
