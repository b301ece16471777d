"""The poll against a real Prefect server, a real MLflow and a Hub on loopback."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.events.filters import EventFilter
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled, State, Suspended

from lewis import store
from lewis.errors import BrokenModelError, TransientError
from lewis.models.source import pin_all
from lewis.registry import releases, tracking
from lewis.registry.releases import Moved
from lewis_flows import polls, recipes_folder, release_event, watch
from lewis_flows.merge import merge_flow
from lewis_flows.service.receiver import Receiver
from lewis_flows.service.status import status
from lewis_flows.watch import WatchReport, poll
from lewis_tasks.support.flow_run import MODEL, tag
from lewis_tasks.support.flow_run import RECIPE as TEXT
from tests.conftest import Family
from tests.flows.service.test_webhook import payload
from tests.support.lineage import registered
from tests.support.local_hub import LocalHub
from tests.support.relays import Forgetful

RECIPE = """
merge_method: ties
base_model: org/base
models: [{model: org/math}, {model: org/code}]
register: {name: %s}
"""


@pytest.fixture(scope="module")
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    """A client of the server that the flows of this module run on, without the second that a heartbeat costs."""
    settings: dict[Any, Any] = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


def events(client: SyncPrefectClient, recipe: str) -> list[dict]:
    """What was announced of a recipe, the newest first."""
    wanted = {"event": {"name": [release_event.EVENT]}, "resource": {"labels": {"lewis.recipe": recipe}}}
    found = [event.payload for event in client.read_events(EventFilter.model_validate(wanted), limit=50).events]
    assert all(each.pop("message").startswith(f"{each['repo']} moved: ") for each in found)
    return found


def until(true: Callable[[], bool], timeout: float = 120) -> None:
    """The server stores events in batches, so they are there after some seconds."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@flow(name="merge")
def _merge(recipe: str) -> None:
    """Stands for the merge in the server's records."""


def started(client: SyncPrefectClient, recipe: str, *states: State) -> FlowRun:
    """A run of the merge flow that went through the states."""
    run = client.create_flow_run(_merge, parameters={"recipe": recipe}, state=states[0])
    for state in states[1:]:
        client.set_flow_run_state(run.id, state, force=True)
    return client.read_flow_run(run.id)


def test_a_release_is_announced_once_and_not_again_after_the_merge(
    hub: LocalHub, recipes: Path, client: SyncPrefectClient, family: Family
) -> None:
    (recipes / "life.yaml").write_text(RECIPE % "life")
    report = poll()
    assert report == WatchReport(checked=["life"], announced=["life: org/math"])
    math = hub.repos["model", "org/math"].branches["main"]
    until(lambda: bool(events(client, "life")))
    first = {"recipe": "life", "ref": "org/math", "repo": "org/math", "old": None, "new": math}
    assert events(client, "life") == [first]
    assert poll().waiting == ["life: org/math"]

    heads = releases.heads(*pin_all(recipes_folder.load("life")))
    registered(family.base, "a", heads, "life")
    with tracking.client("a champion") as mlflow:
        mlflow.set_registered_model_alias("life", "champion", "1")
    assert poll() == WatchReport(checked=["life"]) and polls.behind_since() == {"life": None}
    new = hub.commit("org/code", family.math)
    assert poll(["life"]).announced == ["life: org/code"]
    assert datetime.now(UTC) - timedelta(minutes=3) < (polls.behind_since()["life"] or NOW) < datetime.now(UTC)
    until(lambda: len(events(client, "life")) == 2)
    second = {"recipe": "life", "ref": "org/code", "repo": "org/code", "old": heads["org/code"], "new": new}
    assert events(client, "life") == [second, first]
    assert poll([str(recipes / "life.yaml")]).waiting == ["life: org/code"]

    newer = hub.commit("org/code", family.base)
    assert poll().announced == ["life: org/code"]
    until(lambda: len(events(client, "life")) == 3)
    assert events(client, "life")[0] == {**second, "new": newer}


def test_a_release_of_a_paused_recipe_waits_until_it_is_resumed(
    hub: LocalHub, recipes: Path, client: SyncPrefectClient
) -> None:
    """It was merged: to Prefect's server a pause only ends the schedules."""
    (recipes / "paused.yaml").write_text(RECIPE % "paused")
    deployment = client.create_deployment(client.create_flow(_merge), "paused")
    client.pause_deployment(deployment)
    math = hub.repos["model", "org/math"].branches["main"]
    assert poll() == WatchReport(checked=["paused"], waiting=["paused: org/math"])
    assert (
        Receiver().take(json.dumps(payload("org/math", math)).encode())[1]["why"]
        == "the recipes that follow this repo are paused"
    )
    client.resume_deployment(deployment)
    assert poll().announced == ["paused: org/math"]
    client.delete_deployment(deployment)


def test_an_edit_is_merged_again_if_nothing_came_of_it(
    hub: LocalHub, recipes: Path, client: SyncPrefectClient, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a release is; the recipe registers nothing, so no release of a model stands in for the edit."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    before, now = (RECIPE.split("register:")[0] + f"dtype: {each}" for each in ("float32", "bfloat16"))
    (recipes / "edit.yaml").write_text(now)
    version = recipes_folder.version(before.encode())
    deployment = client.create_deployment(client.create_flow(_merge), "edit", version=version)
    merged = started(client, "edit", Running(), Completed())
    client.update_flow_run_labels(merged.id, {TEXT: store.digest(before)})
    assert poll() == WatchReport()  # the deploy of the file starts a run
    client.update_deployment(deployment, DeploymentUpdate(version=recipes_folder.version(now.encode())))

    def ended(run: FlowRun, *states: State) -> None:
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)

    def newest() -> FlowRun:
        wanted = FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment]}})
        runs = client.read_flow_runs(flow_run_filter=wanted)
        return max(runs, key=lambda run: run.created or NOW)

    client.pause_deployment(deployment)
    assert poll() == WatchReport(waiting=["edit: its file"])
    client.resume_deployment(deployment)
    client.update_deployment(deployment, DeploymentUpdate(parameters={"recipe": "edit"}))
    assert poll() == WatchReport(announced=["edit: its file"])  # it was edited during the pause
    assert poll() == WatchReport(waiting=["edit: its file"])
    (found,) = status("edit", hub=False).recipes or []
    assert found.unmerged and found.next_attempt is None
    ended(newest(), Running(), Crashed())
    (found,) = status("edit", hub=False).recipes or []
    assert found.attempt(datetime.now(UTC)) == "at the next poll"
    assert poll() == WatchReport(announced=["edit: its file"])
    ended(newest(), Running(), Failed())
    assert poll() == WatchReport(waiting=["edit: its file"])
    (found,) = status("edit", hub=False).recipes or []
    assert found.next_attempt and found.next_attempt > datetime.now(UTC) + timedelta(minutes=50)
    monkeypatch.setattr(watch, "RETRY_AFTER", timedelta(0))
    assert poll() == WatchReport(announced=["edit: its file"])
    last = newest()
    ended(last, Running(), Cancelled())
    client.update_flow_run_labels(last.id, {TEXT: store.digest(now)})
    tag(last.id, awaits="models:/edit/1")  # it was cancelled while it waited for a person
    assert poll() == WatchReport()
    client.delete_deployment(deployment)


def test_what_is_broken_does_not_stop_the_others(
    hub: LocalHub, recipes: Path, family: Family, tmp_path: Path, client: SyncPrefectClient
) -> None:
    shutil.copytree(family.code, tmp_path / "expert")
    texts = {
        "bad-key": RECIPE.replace("merge_method", "merge_metod") % "bad-key",
        "bad-repo": RECIPE.replace("org/math", "org/none") % "bad-repo",
        "bad-folder": RECIPE.replace("org/math", "./none") % "bad-folder",
        "bad-task": RECIPE % "bad-task" + "evaluate: {tasks: [tasks/none.yaml]}",
        "busy-hub": RECIPE.replace("org/math", "org/busy") % "busy-hub",
        "folder": RECIPE.replace("org/math", str(tmp_path / "expert")) % "folder",
        "plain": RECIPE.split("register:")[0],
    }
    for name, text in texts.items():
        (recipes / f"{name}.yaml").write_text(text)
    hub.faults.append({"path": "org/busy", "status": 503, "times": 99})
    report = poll()
    assert report.checked == ["folder"] and report.announced == [f"folder: {tmp_path}/expert"]
    told = {"bad-key": "merge_metod", "bad-repo": "org/none", "bad-folder": "./none", "bad-task": "tasks/none.yaml"}
    assert report.problems.keys() == {*told, "busy-hub"}
    for name, words in told.items():
        assert words in report.problems[name]
    assert sum("org/none" in request.path for request in hub.log) == 1


def test_nothing_that_answers_is_an_error_that_says_so(
    hub: LocalHub, recipes: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipes / "busy.yaml").write_text(RECIPE % "busy")
    hub.faults.append({"path": "org/base", "status": 503, "times": 99})
    with pytest.raises(TransientError, match=r"nothing could be checked:\n.*org/base"):
        poll()
    hub.faults.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TransientError, match="reading the versions of busy"):
        poll()


def test_an_announcement_that_prefect_did_not_take_is_an_error(
    hub: LocalHub, recipes: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipes / "lost.yaml").write_text(RECIPE % "lost")

    def announce(*_: object) -> str:
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
            return real(*_)

    real = release_event.announce
    monkeypatch.setattr(release_event, "announce", announce)
    with pytest.raises(TransientError, match="Prefect did not take the event"):
        poll()
    monkeypatch.setattr(release_event, "announce", real)
    assert poll().announced == ["lost: org/math"]


def test_an_announcement_that_died_with_its_server_is_repeated(
    hub: LocalHub, recipes: Path, client: SyncPrefectClient, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipes / "died.yaml").write_text(RECIPE % "died")
    real = release_event.announce
    with Forgetful(prefect_url) as server:

        def announce(*about: Any) -> str:
            with temporary_settings({PREFECT_API_URL: server.url}):
                return real(*about)

        monkeypatch.setattr(release_event, "announce", announce)
        assert poll().announced == ["died: org/math"] and server.taken == 1
        monkeypatch.setattr(release_event, "announce", real)
    assert poll().announced == ["died: org/math"]
    until(lambda: len(events(client, "died")) == 1)
    assert poll().waiting == ["died: org/math"]


def test_a_history_that_cannot_be_read_is_transient(recipes: Path) -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(TransientError, match="Prefect's history cannot be read"),
    ):
        watch._is_news("x", Moved("org/math", "org/math", None, "1"))


# What became of an announcement, and whether the next poll repeats it

OLD_RELEASE, RELEASE = "0" * 40, "1" * 40
TOMORROW, NOW = datetime.now(UTC) + timedelta(hours=20), datetime.now(UTC)
HOUR_GONE, MINUTES_GONE = {"RETRY_AFTER": timedelta(0)}, {"ANSWER_WITHIN": timedelta(0)}
CASES: dict[str, tuple[list[tuple[State, ...]], dict[str, timedelta], bool]] = {
    "nothing yet": ([], {}, False),
    "lost": ([], MINUTES_GONE, True),
    "scheduled": ([(Scheduled(),)], MINUTES_GONE, False),
    "running": ([(Running(),)], MINUTES_GONE, False),
    "waits for a place": ([(Scheduled(name="AwaitingConcurrencySlot"),)], MINUTES_GONE, False),
    "only tonight": ([(Scheduled(scheduled_time=TOMORROW),)], MINUTES_GONE, True),
    "completed": ([(Running(), Completed())], MINUTES_GONE | HOUR_GONE, False),
    "failed": ([(Running(), Failed())], MINUTES_GONE, False),
    "failed long ago": ([(Running(), Failed())], HOUR_GONE, True),
    "crashed": ([(Running(), Crashed())], {}, True),
    "crashed before it began": ([(Scheduled(), Crashed())], {}, True),
    "cancelled": ([(Running(), Cancelled())], {}, True),
    "rejected": ([(Running(), Cancelled(name="Rejected"))], MINUTES_GONE | HOUR_GONE, False),
    "crashed, runs again": ([(Running(), Crashed()), (Running(),)], {}, False),
    "failed, then crashed": ([(Running(), Failed()), (Running(), Crashed())], {}, True),
    "crashed, then failed": ([(Running(), Crashed()), (Running(), Failed())], {}, False),
    "only skipped": ([(Running(), Completed(name="Skipped"))], MINUTES_GONE, True),
    "waits for a person": ([(Running(), Suspended())], MINUTES_GONE | HOUR_GONE, False),
    "skipped for one that failed": ([(Running(), Completed(name="Skipped")), (Running(), Failed())], HOUR_GONE, True),
}


@pytest.fixture(scope="module")
def announced(client: SyncPrefectClient) -> None:
    """One release for each case, in the server's records."""
    for name in [*CASES, "stuck", "by path", "of another"]:
        release_event.announce(name, "org/math", "org/math", OLD_RELEASE, RELEASE)
    until(lambda: bool(events(client, "of another")))


@pytest.mark.parametrize("case", CASES)
def test_an_announcement_is_repeated_if_nothing_came_of_it(
    announced: None, client: SyncPrefectClient, recipes: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    runs, patience, repeated = CASES[case]
    for states in runs:
        started(client, case, *states)
    for name, value in patience.items():
        monkeypatch.setattr(watch, name, value)
    assert watch._is_news(case, Moved("org/math", "org/math", OLD_RELEASE, RELEASE)) is repeated


def test_another_commit_reference_or_recipe_was_never_announced(announced: None, recipes: Path) -> None:
    for case in ("nothing yet", "completed"):
        assert not watch._is_news(case, Moved("org/math", "org/math", OLD_RELEASE, RELEASE))
        assert watch._is_news(case, Moved("org/math", "org/math", OLD_RELEASE, "2" * 40))
        assert watch._is_news(case, Moved("org/math@main", "org/math", OLD_RELEASE, RELEASE))
    assert watch._is_news("unheard of", Moved("org/math", "org/math", OLD_RELEASE, RELEASE))


def test_a_release_is_repeated_though_an_older_version_waits_for_a_person(
    client: SyncPrefectClient, recipes: Path, announced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run was taken for one of the release, for as long as nobody answered."""
    started(client, "asks", Running(), Suspended())
    release_event.announce("asks", "org/math", "org/math", OLD_RELEASE, RELEASE)
    until(lambda: bool(events(client, "asks")))
    started(client, "asks", Running(), Crashed())
    assert watch._is_news("asks", Moved("org/math", "org/math", OLD_RELEASE, RELEASE))


@pytest.mark.long
def test_a_release_that_is_broken_on_the_hub_waits_for_another_commit(
    hub: LocalHub,
    client: SyncPrefectClient,
    prefect_url: str,
    recipes: Path,
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long that takes: also when the announcement is forgotten."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    (recipes / "broken.yaml").write_text(RECIPE % "broken")
    assert poll().announced == ["broken: org/math"]
    run = started(client, "broken", Running(), Failed())
    started(client, "broken", Running(), Crashed())
    for name, value in ({"REMEMBER": timedelta(0)} | MINUTES_GONE | HOUR_GONE).items():
        monkeypatch.setattr(watch, name, value)
    assert poll().announced == ["broken: org/math"]
    assert (status("broken").recipes or [])[0].attempt(NOW + timedelta(hours=1)) == "at the next poll"
    (recipes / "broken.yaml").write_text(RECIPE % "broken" + "evaluate: {tasks: [none.yaml]}")
    assert (status("broken").recipes or [])[0].attempt(NOW) == "after it is corrected"
    (recipes / "broken.yaml").write_text(RECIPE % "broken")
    tag(run.id, broken=hub.repos["model", "org/code"].branches["main"])
    assert poll().waiting == ["broken: org/math"]
    told = "after another commit of org/code, which is broken on the Hub"
    assert (status("broken").recipes or [])[0].attempt(NOW) == told
    hub.commit("org/math", family.base)  # which does not mend the other one
    assert poll().waiting == ["broken: org/math"]
    hub.commit("org/code", family.base)
    assert poll().announced == ["broken: org/math"]


@pytest.mark.long
def test_a_commit_is_broken_until_the_recipe_is_edited_or_a_later_run_merges_it(
    hub: LocalHub,
    client: SyncPrefectClient,
    prefect_url: str,
    recipes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One old failure kept off all releases of the other models for ever."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    for name, value in ({"REMEMBER": timedelta(0)} | MINUTES_GONE | HOUR_GONE).items():
        monkeypatch.setattr(watch, name, value)
    text, code = RECIPE % "mended", hub.repos["model", "org/code"].branches["main"]
    (recipes / "mended.yaml").write_text(text)

    def ended(state: State, **tags: str) -> FlowRun:
        run = started(client, "mended", Running(), state)
        client.update_flow_run_labels(run.id, {TEXT: store.digest(text), f"{MODEL}org/code": code})
        tag(run.id, recipe="mended", **tags)
        return run

    def attempt() -> str:
        (found,) = status("mended").recipes or []
        return found.attempt(TOMORROW)

    first = ended(Failed(), broken=code)
    assert poll(["mended"]).waiting == ["mended: org/math"] and attempt().startswith("after another commit of org/code")
    (recipes / "mended.yaml").write_text(f"{text}dtype: float32\n")
    assert poll(["mended"]).announced == ["mended: org/math"] and attempt() == "at the next poll"
    (recipes / "mended.yaml").write_text(text)
    assert poll(["mended"]).waiting == ["mended: org/math"]

    other = started(client, "mended", Running(), Completed())  # of other commits
    client.update_flow_run_labels(other.id, {TEXT: store.digest(text), f"{MODEL}org/code": OLD_RELEASE})
    tag(other.id, recipe="mended")
    started(client, "mended", Running(), Crashed())
    assert poll(["mended"]).waiting == ["mended: org/math"]
    ended(Completed())
    started(client, "mended", Running(), Crashed())
    assert poll(["mended"]).announced == ["mended: org/math"] and attempt() == "at the next poll"
    assert ended(Failed(), broken=code).id != first.id  # the last word again
    assert poll(["mended"]).waiting == ["mended: org/math"] and attempt().startswith("after another commit of org/code")


@pytest.mark.long
def test_a_run_that_finds_a_broken_tokenizer_is_not_repeated_until_another_commit_comes(
    hub: LocalHub,
    client: SyncPrefectClient,
    prefect_url: str,
    recipes: Path,
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each hour there was one, which downloaded the model and failed."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    files = {path.name: path.read_bytes() for path in family.code.iterdir() if path.is_file()}
    hub.commit("org/code", {**files, "tokenizer.json": "{"})
    (recipes / "odd.yaml").write_text(RECIPE % "odd")
    with pytest.raises(BrokenModelError, match=r"org/code: tokenizer.json is broken on the Hub itself"):
        merge_flow("odd")
    for name, value in ({"REMEMBER": timedelta(0)} | MINUTES_GONE | HOUR_GONE).items():
        monkeypatch.setattr(watch, name, value)
    assert poll(["odd"]).waiting == ["odd: org/math"]
    (recipes / "odd.yaml").write_text(RECIPE % "odd" + "dtype: float32\n")  # which may be merged
    assert poll(["odd"]).announced == ["odd: org/math"]
    (recipes / "odd.yaml").write_text(RECIPE % "odd")
    hub.commit("org/code", {**files, "README.md": "# mended"})
    assert poll(["odd"]).announced == ["odd: org/math"]


def test_a_release_of_a_recipe_that_registers_nothing_is_repeated_until_a_run_has_merged_it(
    hub: LocalHub, client: SyncPrefectClient, recipes: Path
) -> None:
    """It waited for the night, as no version says what was merged."""
    (recipes / "unkept.yaml").write_text(RECIPE.split("register:")[0])
    assert poll() == WatchReport()
    release_event.announce("unkept", "org/math", "org/math", OLD_RELEASE, RELEASE)
    until(lambda: bool(events(client, "unkept")))
    assert poll().announced == []  # its run may come
    started(client, "unkept", Running(), Crashed())
    assert poll() == WatchReport(announced=["unkept: org/math"])
    until(lambda: len(events(client, "unkept")) == 2)
    started(client, "unkept", Running(), Completed())
    started(client, "unkept", Running(), Crashed())  # of something else
    assert poll() == WatchReport()


def test_a_release_whose_runs_fail_three_times_is_told(
    announced: None, client: SyncPrefectClient, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(release_event, "announce_stuck", lambda *about: told.append(about))
    for expected in (0, 0, 1):
        started(client, "stuck", Running(), Failed(message="no space\nmore"))
        assert not watch._is_news("stuck", Moved("org/math", "org/math", OLD_RELEASE, RELEASE))
        assert len(told) == expected
    assert told == [("stuck", "org/math", "org/math", RELEASE, "no space")]


def test_a_run_by_path_counts_and_that_of_another_recipe_does_not(
    announced: None, client: SyncPrefectClient, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = Moved("org/math", "org/math", OLD_RELEASE, RELEASE)
    started(client, str(recipes / "by path.yaml"), Running(), Completed())
    started(client, "/elsewhere/of another.yaml", Running())
    monkeypatch.setattr(watch, "ANSWER_WITHIN", timedelta(0))
    assert not watch._is_news("by path", move)
    assert watch._is_news("of another", move)


def test_a_commit_that_is_the_newest_again_is_news(client: SyncPrefectClient, recipes: Path) -> None:
    """The author took a later release back within the day; the announcement of before was taken for that of now."""
    for number, commit in enumerate((OLD_RELEASE, RELEASE), 1):
        release_event.announce("back", "org/math", "org/math", None, commit)
        until(lambda number=number: len(events(client, "back")) == number)
    started(client, "back", Running(), Completed())
    assert watch._is_news("back", Moved("org/math", "org/math", RELEASE, OLD_RELEASE))
    assert not watch._is_news("back", Moved("org/math", "org/math", OLD_RELEASE, RELEASE))


def test_a_webhook_that_knew_the_adapters_commit_only_announced_it(client: SyncPrefectClient, recipes: Path) -> None:
    release_event.announce("adapter", "org/lora", "org/lora", None, RELEASE)
    until(lambda: bool(events(client, "adapter")))
    assert not watch._is_news("adapter", Moved("org/lora", "org/lora", None, f"{OLD_RELEASE}+{RELEASE}"))
