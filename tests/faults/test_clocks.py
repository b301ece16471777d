"""Clocks that differ between machines or go back: nothing waits for ever, is started for nothing, or is passed over."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from filelock import Timeout
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events import DeploymentEventTrigger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, Running, Scheduled

from lewis import store
from lewis.errors import InputError
from lewis.registry import outbox
from lewis.registry.releases import Moved
from lewis.store import kinds, lease, remote
from lewis.store.lease import Lease, SharedLock
from lewis_flows import prefect_runs, release_event, retention, turn, watch
from lewis_flows.service import cancel, keep_served, receiver, worker
from lewis_tasks.support import moves
from tests.conftest import full
from tests.faults.running import until
from tests.support.lineage import make_home

DAY, HOUR = 86400.0, timedelta(hours=1)


# Leases


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_asleep", {})
    for name, value in {"SECONDS": 0.6, "GRACE": 0.2, "_POLL": 0.02}.items():
        monkeypatch.setattr(lease, name, value)
    return tmp_path / "remote"


def skewed(monkeypatch: pytest.MonkeyPatch, **by: float) -> None:
    """Give threads, by the beginning of their names, clocks that are so many seconds ahead."""

    def clock() -> float:
        name = threading.current_thread().name
        return time.time() + next((seconds for begin, seconds in by.items() if name.startswith(begin)), 0.0)

    monkeypatch.setattr(lease, "time", SimpleNamespace(time=clock, monotonic=time.monotonic, sleep=time.sleep))


@pytest.mark.parametrize("patience", [-1.0, 0.0])
def test_a_dead_holder_whose_clock_was_a_day_ahead(bucket: Path, patience: float) -> None:
    """Its lease ends as soon as that of any other, also for those who look now and then and do not wait."""
    place = bucket / Lease("dead")._folder
    place.mkdir(parents=True)
    (place / "00000001").write_text(json.dumps({"end": time.time() + DAY}))
    with pytest.raises(Timeout):
        Lease("dead").acquire(timeout=0)
    begin = time.monotonic()

    def taken() -> bool:
        try:
            Lease("dead").acquire(patience).close()
        except Timeout:
            return False
        return True

    assert until(taken, 20) and 0.6 < time.monotonic() - begin < 20


@pytest.mark.parametrize("ahead", [DAY, -DAY / 2])
def test_a_living_holder_whose_clock_is_wrong(bucket: Path, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """One that is ahead keeps its lease; one that is behind may lose it, and gives nothing back that is another's."""
    skewed(monkeypatch, holder=ahead, **{"lewis-lease": ahead})
    held, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with Lease("living").acquire():
            held.set()
            ended.wait(60)

    holder = threading.Thread(target=hold, name="holder")
    holder.start()
    assert held.wait(60)
    other = Lease("living")
    if ahead > 0:
        with pytest.raises(Timeout):
            other.acquire(timeout=3 * (lease.SECONDS + lease.GRACE))
    else:
        other.acquire(timeout=20)
    ended.set()
    holder.join()
    if ahead < 0:
        with pytest.raises(Timeout):
            Lease("living").acquire(timeout=0)
        other.release()
    Lease("living").acquire(timeout=20).close()


@pytest.mark.parametrize("whose", ["holder", "all"])
@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_clock_that_jumps_while_a_lease_is_held(
    bucket: Path, monkeypatch: pytest.MonkeyPatch, jump: float, whose: str
) -> None:
    """Nobody takes a lease that is renewed; once it is not, another does, and the holder gives nothing of his back."""
    monkeypatch.setattr(lease, "SECONDS", 1.0)
    monkeypatch.setattr(lease, "GRACE", 0.5)
    name, shift = uuid4().hex, 0.0
    holder, other = Lease(name), Lease(name)

    def clock() -> float:
        mine = whose == "all" or threading.current_thread() is holder._keeper
        return time.time() + (shift if mine else 0.0)

    monkeypatch.setattr(lease, "time", SimpleNamespace(time=clock, monotonic=time.monotonic, sleep=time.sleep))
    holder.acquire()
    place = bucket / holder._folder / holder._own
    shift, before = jump, place.read_text()
    assert until(lambda: place.read_text() not in ("", before), 60)
    with pytest.raises(Timeout):
        other.acquire(timeout=0)
    assert holder._keeper
    holder._ended.set()
    holder._keeper.join(60)
    other.acquire(timeout=60)
    holder.release()
    with pytest.raises(Timeout):
        Lease(name).acquire(timeout=0)
    other.release()
    assert other._keeper
    assert not holder._keeper.is_alive() and not other._keeper.is_alive()
    Lease(name).acquire(timeout=60).close()


@pytest.mark.parametrize(("ahead", "most"), [(0.1, 1), (3600.0, 2), (-3600.0, 2)])
def test_two_workers_make_one_entry(bucket: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, most: int) -> None:
    """Clocks that differ by more than `GRACE` may cost double work, and nothing else."""
    skewed(monkeypatch, one=ahead)
    made, started, path = [], threading.Barrier(2), kinds.SCORES.path("7e")

    def work() -> None:
        name = threading.current_thread().name
        started.wait()
        with SharedLock("scores-7e", local=name):
            if not path.exists():
                time.sleep(0.05)
                store.write_entry(path, {"results": 1})
                made.append(name)

    threads = [threading.Thread(target=work, name=name) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 1 <= len(made) <= most and store.read_entry(path) == {"results": 1}


# Events


@pytest.fixture
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        yield client


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: timedelta) -> None:
    """Set the clock of this machine, as LEWIS reads it where it speaks with Prefect."""

    class Skewed(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + ahead

    for name, module in list(sys.modules.items()):
        used = getattr(module, "datetime", None) if name.startswith(("lewis_flows", "lewis_tasks")) else None
        if isinstance(used, type) and issubclass(used, datetime):
            monkeypatch.setattr(module, "datetime", Skewed)


@flow(name="merge")
def _merge(recipe: str) -> None:
    """Stands for the merge in the server's records."""


@pytest.mark.parametrize("ahead", [HOUR, pytest.param(-HOUR, marks=full)])
def test_a_receiver_whose_clock_is_wrong(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, ahead: timedelta
) -> None:
    """A release is announced at the server's time, and its run that failed is seen: it is not announced each minute."""
    recipe, move = f"clock{uuid4().hex[:8]}", Moved("org/math", "org/math", None, "1" * 40)
    set_clock(monkeypatch, ahead)
    release_event.announce(recipe, "org/math", "org/math", None, "1" * 40)
    assert until(lambda: release_event.announced(client, datetime.now(UTC) - timedelta(minutes=1), recipe), 60)
    (event,) = release_event.announced(client, datetime.now(UTC) - timedelta(minutes=1), recipe)
    assert abs(datetime.now(UTC) - event.occurred) < timedelta(minutes=1)
    run = client.create_flow_run(_merge, parameters={"recipe": recipe}, state=Running())
    client.set_flow_run_state(run.id, Failed(), force=True)
    monkeypatch.setattr(watch, "ANSWER_WITHIN", timedelta(0))
    assert not watch._is_news(recipe, move)


def test_a_release_is_known_where_the_clock_is_a_month_ahead(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver takes it for a repeated delivery, and the poll sees that no run has merged it."""
    recipe, commit = f"known{uuid4().hex[:8]}", "1" * 40
    set_clock(monkeypatch, timedelta(days=30))
    release_event.announce(recipe, "org/math", "org/math", None, commit)
    assert until(lambda: receiver._ask({recipe: ("org/math", "org/math")}, commit) == (set(), {recipe}, set()), 60)
    assert watch._unmerged_release(recipe) == Moved("org/math", "org/math", None, commit)


def test_a_trigger_fires_again_after_the_clock_was_set_back(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect passes over events from before the one that fired a trigger last."""
    repo = f"org/{uuid4().hex[:8]}"
    of_flow = client.create_flow(_merge)
    made = client.create_deployment(
        of_flow, name=uuid4().hex[:8], parameters={"recipe": "x"}, enforce_parameter_schema=False
    )
    trigger = DeploymentEventTrigger(
        name=repo,
        expect={release_event.EVENT},
        match={"prefect.resource.id": release_event.resource_id(repo)},
        within=timedelta(seconds=1),
    )
    trigger.set_deployment_id(made)
    client.create_automation(trigger.as_automation())

    def runs() -> int:
        return len(prefect_runs.of_flows(client, ("merge",), ("SCHEDULED",), deployment_id={"any_": [made]}))

    for number, ahead in enumerate([HOUR, timedelta(0)], 1):
        time.sleep(2)  # the time that the trigger rests
        set_clock(monkeypatch, ahead)
        release_event.announce("x", repo, repo, None, str(number) * 40)
        assert until(lambda number=number: runs() == number, 30), runs()  # type: ignore[misc]
    client.delete_deployment(made)  # other tests have this server too


@pytest.fixture
def planned(client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FlowRun]]:
    """Two runs of a recipe that a schedule made: one is due for a minute, one in half an hour."""
    recipe, now = f"plan{uuid4().hex[:8]}", datetime.now(UTC)
    (tmp_path / f"{recipe}.yaml").write_text("{merge_method: ties, base_model: org/base, models: [{model: org/math}]}")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    first = now - timedelta(minutes=1)
    made = client.create_deployment(
        client.create_flow(_merge),
        name=recipe,
        parameters={"recipe": recipe},
        schedules=[DeploymentScheduleCreate(schedule=IntervalSchedule(interval=HOUR / 2, anchor_date=first))],
        enforce_parameter_schema=False,
    )
    between = {"start_time": (now - HOUR / 4).isoformat(), "end_time": (now + HOUR / 2).isoformat()}
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": made}, json={**between, "min_runs": 2})
    runs = prefect_runs.of_flows(client, ("merge",), ("SCHEDULED",), deployment_id={"any_": [made]})
    yield sorted(runs, key=lambda run: run.expected_start_time or now)[:2]
    client.delete_deployment(made)  # other tests have this server too


@pytest.mark.parametrize("ahead", [HOUR, pytest.param(-HOUR, marks=full)])
def test_a_run_that_a_schedule_plans(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, planned: list[FlowRun], ahead: timedelta
) -> None:
    """What is due ends with a run that begins, and by `lewis cancel`; what is planned stays, and holds up no other."""
    due, later = planned
    assert due.auto_scheduled and later.auto_scheduled
    set_clock(monkeypatch, ahead)
    begins = client.create_flow_run_from_deployment(due.deployment_id, state=Running())
    turn.absorb(client.read_flow_run(begins.id))
    assert [client.read_flow_run(run.id).state_name for run in planned] == ["Skipped", "Scheduled"]
    client.set_flow_run_state(begins.id, Completed(), force=True)
    a_minute_ago = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(minutes=1))
    waits = client.create_flow_run_from_deployment(due.deployment_id, state=a_minute_ago)
    assert [each.id for each in cancel.cancel(prefect_runs.recipe_of(due))] == [str(waits.id)]
    assert client.read_flow_run(later.id).state_name == "Scheduled"
    monkeypatch.setattr(prefect_runs, "SERVE", "merge")
    assert keep_served._start(client, prefect_runs.recipe_of(due))


@pytest.mark.parametrize("ahead", [pytest.param(HOUR, marks=full), -HOUR])
def test_a_burst_is_waited_for_by_the_clock_of_the_server(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, ahead: timedelta
) -> None:
    monkeypatch.setattr(release_event, "REST", timedelta(seconds=1))
    monkeypatch.setattr(release_event, "BURST", HOUR / 2)
    recipe = f"burst{uuid4().hex[:8]}"
    set_clock(monkeypatch, ahead)
    begin = time.monotonic()
    for commit in "12":
        release_event.announce(recipe, "org/math", "org/math", None, commit * 40)
    assert until(lambda: len(release_event._recent(recipe)) == 2, 240)
    ages = release_event._recent(recipe)
    past = timedelta(seconds=time.monotonic() - begin)
    few = timedelta(seconds=30)  # the server says its time in whole seconds, after a while
    assert len(ages) == 2 and all(-few < age < past + few for age in ages), ages
    begin = time.monotonic()
    release_event.settle(recipe)
    assert timedelta(seconds=time.monotonic() - begin) < release_event.LONGEST


def test_a_wait_for_a_burst_ends_though_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, -HOUR)
    times = iter([0.0, 1.0, 60.0, 119.0, 121.0])
    clock = SimpleNamespace(monotonic=lambda: next(times), sleep=lambda _: set_clock(monkeypatch, -24 * HOUR))
    monkeypatch.setattr(release_event, "time", clock)
    monkeypatch.setattr(release_event, "_recent", lambda _: [timedelta(0)] * 2)
    release_event.settle("x")
    assert next(times, None) is None


def test_the_news_of_a_champion_is_kept_where_the_clock_is_a_month_ahead(
    client: SyncPrefectClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = outbox.Move(f"tiny-{uuid4().hex[:6]}", "2", None, ["better"], happened=True)
    outbox.write(move)
    set_clock(monkeypatch, timedelta(days=30))
    moves._forget_known()
    assert outbox.moves() == [move]


def test_nothing_is_old_because_a_clock_is_a_year_ahead(
    client: SyncPrefectClient, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retention keeps what ended, or was written, lately by the clock of Prefect's server."""
    make_home(tmp_path / "home", empty_database, monkeypatch)
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    store.write_entry(kinds.SCORES.path("7e" * 32), {"results": 1})
    kinds.SCORES.path("7e" * 32).unlink()  # another machine wrote it
    recipe = f"old{uuid4().hex[:8]}"
    for _ in range(2):
        run = client.create_flow_run(_merge, parameters={"recipe": recipe}, state=Running())
        client.set_flow_run_state(run.id, Completed(), force=True)
    set_clock(monkeypatch, timedelta(days=365))
    clock = SimpleNamespace(time=lambda: time.time() + 365 * DAY)
    monkeypatch.setattr(retention, "time", clock)
    assert retention.survey(retention.DAYS) == []


def test_a_worker_whose_clock_is_wrong_does_not_start(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs would be taken for dead, as their heartbeats came from the past."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    worker.check_clock()
    set_clock(monkeypatch, -HOUR)
    with pytest.raises(InputError, match=r"3[56]\d\d s behind that of Prefect's server.*NTP"):
        worker.check_clock()
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    worker.check_clock()  # which is for Prefect's worker to say
