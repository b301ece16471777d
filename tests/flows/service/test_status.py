"""What `lewis status` tells, of real servers and of ones that are not there."""

import json
import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import WorkQueueStatus
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, Running, Scheduled, State

from lewis.errors import InputError
from lewis.evaluation.gate import Verdict
from lewis.registry import promotion, tracking
from lewis.serving import records, slots
from lewis.serving.records import Served
from lewis_flows.cli.main import main
from lewis_flows.service import recipes_page, status_data
from lewis_flows.service.links import last_run
from lewis_flows.service.metrics import of_registry
from lewis_flows.service.status import status
from lewis_flows.service.status_data import Part, Run, Status, Watched
from lewis_flows.service.status_text import as_text, moment
from tests.conftest import Family
from tests.support.lineage import make_home, registered
from tests.support.local_hub import LocalHub
from tests.support.warm import WarmPython

RECIPE = """
merge_method: ties
base_model: org/base
models: [{model: org/math}, {model: org/code}]
register: {name: %s}
"""


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return make_home(tmp_path / "home", empty_database, monkeypatch)


@pytest.fixture
def client(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    """A client of the server that `status` finds in the environment."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        yield client


@flow(name="merge")
def _merge(recipe: str) -> None:
    """Stands for the merge in the server's records."""


@flow(name="search")
def _search(recipe: str) -> None:
    """Stands for the search."""


def started(client: SyncPrefectClient, recipe: str, name: str, *states: State, flow: Any = _merge) -> None:
    run = client.create_flow_run(flow, name=name, parameters={"recipe": recipe}, state=states[0])
    for state in states[1:]:
        client.set_flow_run_state(run.id, state, force=True)


def part(found: Status, name: str) -> Part:
    (one,) = [part for part in found.parts if part.name == name]
    return one


def test_the_check_writes_no_news_to_stderr(home: Path, hub: LocalHub, recipes: Path, warm: WarmPython) -> None:
    """Which commit each model is: a mail from cron every minute."""
    (recipes / "tiny.yaml").write_text(RECIPE % "tiny")
    program = "from lewis_flows.cli.main import program; program()"
    checks = warm.run(program, ["status", "--check"], folder=recipes, environment=os.environ)
    out, err = checks.communicate()
    assert (checks.returncode, err) == (10, "") and "Prefect: is not running" in out


def test_champion_and_newer_heads(home: Path, hub: LocalHub, recipes: Path, family: Family) -> None:
    (recipes / "tiny.yaml").write_text(RECIPE % "tiny")
    (before,) = status().recipes or []
    assert (before.registered, before.champion, before.unknown) == ("tiny", None, [])
    commits = {f"org/{name}": hub.repos["model", f"org/{name}"].branches["main"] for name in ("base", "math", "code")}
    assert [(each.ref, each.held, each.head) for each in before.inputs] == [
        (ref, None, head) for ref, head in commits.items()
    ]
    first = registered(family.base, "a", commits, "tiny")
    promotion.promote(first, Verdict(True, (), "base"))
    new = hub.commit("org/code", family.math)
    refused = registered(family.base, "b", {**commits, "org/code": new}, "tiny")
    promotion.promote(refused, Verdict(False, (), first.uri))

    ago = datetime.now(UTC) - timedelta(hours=3)
    (home / "behind.json").write_text(json.dumps({"commits": {"tiny": {"org/code": [[new, ago.isoformat()]]}}}))
    found = status()
    (tiny,) = found.recipes or []
    assert (tiny.champion, tiny.settled, tiny.behind_since) == ("1", True, ago)
    assert status_data.problems(found, datetime.now(UTC))[-1].code == status_data.UNKNOWN  # its gate refused it
    assert {each.ref: (each.held, each.head) for each in tiny.inputs} == {
        ref: (head, new if ref == "org/code" else head) for ref, head in commits.items()
    }
    lines = [" ".join(line.split()) for line in as_text(found, datetime.now(UTC)).splitlines()]
    assert "Recipe tiny: tiny, champion version 1" in lines
    assert f"org/math {commits['org/math'][:8]} the same" in lines
    assert f"org/code {commits['org/code'][:8]} newer: {new[:8]}" in lines
    assert any(line.startswith("behind since 3 h ago (") for line in lines)
    assert json.loads(found.model_dump_json())["recipes"][0]["inputs"][2]["head"] == new

    for text in (
        RECIPE.replace("ties", "tise") % "tiny",
        RECIPE % "tiny" + "models: [",
        "register: {name: 'tiny'}\n[a",
        RECIPE % "tiny" + "evaluate: {tasks: [tasks/none.yaml]}",
    ):
        (recipes / "tiny.yaml").write_text(text)
        (broken,) = status().recipes or []
        assert (broken.registered, broken.champion, broken.broken) == ("tiny", "1", True) and broken.unknown
    assert "tasks/none.yaml: not a readable lm-eval task" in broken.unknown[0]
    assert "Recipe tiny: tiny, champion version 1; broken" in as_text(status(), datetime.now(UTC))


def test_a_champion_that_was_deleted_is_a_problem(home: Path, hub: LocalHub, recipes: Path, family: Family) -> None:
    def lost() -> tuple[str, Status]:
        found = status(hub=False)
        (tiny,) = found.recipes or []
        return tiny.lost, found

    (recipes / "tiny.yaml").write_text(RECIPE % "tiny")
    assert lost()[0] == ""  # nothing is registered
    commits = {f"org/{name}": hub.repos["model", f"org/{name}"].branches["main"] for name in ("base", "math", "code")}
    promotion.promote(registered(family.base, "a", commits, "tiny"), Verdict(False, (), "base"))
    assert lost()[0] == ""  # refused: there was none
    promotion.promote_by_hand("tiny", "1", "x")
    assert lost()[0] == ""
    MlflowClient().delete_model_version("tiny", "1")
    number, found = lost()
    problem = status_data.problems(found, datetime.now(UTC))[-1]
    assert (number, problem.code, problem.about) == ("1", status_data.LOST, "tiny")
    assert "tiny/1 was the champion" in problem.text
    assert "Recipe tiny: tiny, no champion now, version 1 was the last" in as_text(found, datetime.now(UTC))


def test_a_command_to_copy_has_names_as_a_shell_reads_them() -> None:
    waits = Status(parts=[], recipes=[Watched(recipe="chat", registered="my chat", waiting="3")])
    (problem,) = status_data.problems(waits, datetime.now(UTC))
    assert "`lewis approve 'my chat/3' --why TEXT`" in problem.text


def test_a_target_that_the_recipe_has_no_more_is_no_problem(
    home: Path, hub: LocalHub, recipes: Path, family: Family, client: SyncPrefectClient
) -> None:
    """One that `lewis up --serve` tried once, or that left the block `serve`, was a problem for good."""
    serve = 'serve: {kind: webhook, url: "http://127.0.0.1:9/x"}'
    (recipes / "tiny.yaml").write_text(f"{RECIPE % 'tiny'}{serve}")
    version = registered(family.base, "a", {}, "tiny")

    def failed() -> list[str]:
        (tiny,) = status(hub=False).recipes or []
        samples = [each for of in of_registry.read() if of.name == "lewis_serve_failed" for each in of.samples]
        targets = [line.partition(":")[0] for line in tiny.unserved]
        assert targets == [each.labels["target"] for each in samples if each.value]
        return targets

    with tracking.client("targets") as mlflow:
        for kind in ("webhook", "local"):
            records.write(mlflow, Served("tiny", kind, kind).refused(version.uri, "no room"))
    assert failed() == ["webhook"]
    (recipes / "tiny.yaml").write_text(RECIPE % "tiny")
    assert failed() == []
    slots.want(slots.Wanted("tiny"))  # this machine serves it
    assert failed() == ["local"]


def test_a_question_creates_no_database(home: Path, hub: LocalHub, recipes: Path) -> None:
    (recipes / "tiny.yaml").write_text(RECIPE % "tiny")
    (home / "mlflow" / "mlflow.db").unlink()
    (tiny,) = status(hub=False).recipes or []
    assert (tiny.champion, tiny.unknown) == (None, [])  # a store that is empty
    (home / "mlflow" / "artifacts").mkdir()  # its MLflow is elsewhere: an empty one here would hide that
    (tiny,) = status(hub=False).recipes or []
    assert "expected the MLflow that this store was used with" in tiny.unknown[0]
    with pytest.raises(InputError, match="expected the MLflow that this store was used with"):
        records.served()
    assert not (home / "mlflow" / "mlflow.db").exists()


def test_what_is_wrong_has_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    well = Status(parts=[Part(name="Prefect", up=True, state="answers")], running=[], scheduled=[], finished=[])
    since = datetime.now(UTC)
    failed = Run(
        recipe="tiny", flow="search", name="search tiny", state="Failed", message="no space\nmore", since=since
    )
    late = Run(recipe="tiny", name="merge tiny", state="Late", since=since)
    done = Run(recipe="tiny", name="merge tiny", state="Completed", since=since)
    broken = Watched(recipe="tiny", broken=True, unknown=["merge_metod: unknown key"])
    odd = Watched(recipe="odd", unknown=["the heads now: busy"])
    behind = Watched(recipe="slow", behind_since=since - timedelta(hours=2))
    recent = Watched(recipe="new", behind_since=since - timedelta(minutes=50))
    settled = Watched(recipe="refused", behind_since=since - timedelta(days=9), settled=True)
    also = Watched(recipe="busy", behind_since=since - timedelta(hours=2))
    busy = Run(recipe="busy", name="merge busy", state="Running", since=since)
    waits = Watched(recipe="tiny", registered="team.tiny", waiting="7")
    target = "vllm http://gpu: v3 since 2026-12-01 10:00, as tiny; v4 failed 2026-12-01 12:00: does not answer"
    unserved = Watched(recipe="tiny", served=[target], unserved=[target])
    asks = failed.model_copy(
        update={"state": "Suspended"}
    )  # a run that waits for the answer, and came after the failed
    cases: dict[int, dict[str, Any]] = {
        0: {"finished": [done], "running": [busy], "recipes": [Watched(recipe="good"), recent, settled, also]},
        status_data.LOST: {"recipes": [Watched(recipe="tiny", registered="tiny", lost="3")]},
        status_data.UNSERVED: {"recipes": [unserved]},
        status_data.WAITS: {"recipes": [waits, unserved], "finished": [failed], "running": [asks]},
        status_data.BEHIND: {"recipes": [waits, behind]},
        status_data.LATE: {"scheduled": [late]},
        status_data.FAILED: {"scheduled": [late], "finished": [done, failed]},
        status_data.BROKEN: {"finished": [failed], "recipes": [broken]},
        status_data.UNKNOWN: {"recipes": [broken, odd]},
        status_data.DOWN: {"parts": [*well.parts, Part(name="webhooks", up=False, state="is not running")]},
    }
    for code, changes in cases.items():
        monkeypatch.setattr("lewis_flows.service.status.status", lambda *_, n=changes, **__: well.model_copy(update=n))
        assert main(["status", "--check"]) == code
        text = capsys.readouterr().out
        assert main(["status", "--check", "--json"]) == code
        listed = json.loads(capsys.readouterr().out)
        assert [problem["code"] for problem in listed[:1]] == ([code] if code else [])
        assert text.splitlines() == ([f"{each['about']}: {each['text']}" for each in listed] or ["all is well"])
        assert main(["status"]) == (code == status_data.DOWN)
        capsys.readouterr()
    (told,) = status_data.problems(well.model_copy(update={"finished": [failed, failed]}), since)
    assert failed.name in told.text and "tried again" not in told.text
    merge = failed.model_copy(update={"flow": "merge"})
    tiny = Watched(recipe="tiny", next_attempt=since + timedelta(hours=1))
    (told,) = status_data.problems(well.model_copy(update={"finished": [merge], "recipes": [tiny]}), since)
    assert f"(tried again at {tiny.next_attempt.astimezone():%Y-%m-%d %H:%M})" in told.text
    tiny = Watched(recipe="tiny", after="its deployment is resumed")
    (told,) = status_data.problems(well.model_copy(update={"finished": [merge], "recipes": [tiny]}), since)
    assert told.text.endswith("(tried again after its deployment is resumed)")
    older = merge.model_copy(update={"state": "Suspended", "since": since - timedelta(hours=1)})
    asked = {"finished": [merge], "running": [older], "recipes": [tiny]}
    (told,) = status_data.problems(well.model_copy(update=asked), since)
    assert told.code == status_data.FAILED  # a version that waits for a person is no answer to a later failure
    late = behind.model_copy(update={"paused": True})
    asks = older.model_copy(update={"recipe": "slow"})
    (told,) = status_data.problems(well.model_copy(update={"running": [asks], "recipes": [late]}), since)
    assert (told.code, told.text.partition(", and ")[2]) == (status_data.BEHIND, "its deployment is paused")
    removed = {"finished": [merge], "recipes": [recent]}
    assert status_data.problems(well.model_copy(update=removed), since) == []


def test_one_page_of_all_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, bad = datetime.now(UTC), "<script>alert(1)</script>|`*"
    merge = Run(recipe=bad, flow="merge", name="x", state="Failed", message=bad, since=now)
    rising = Watched(recipe="rising", registered="m", champion="3", scores={1: 0.25, 2: 0.5, 3: 1.0}, behind_since=now)
    broken = Watched(recipe=bad, registered=bad, champion="1", waiting="2", next_attempt=now + timedelta(hours=1))
    part = Part(name=bad, up=False, state=bad)
    found = Status(parts=[part], running=[], scheduled=[], finished=[merge], recipes=[rising, broken])
    monkeypatch.setattr("lewis_flows.service.status.status", lambda *_, **__: found)
    assert main(["status", "--html", str(tmp_path / "page.html")]) == 1  # a part is down
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "://" not in page and page.count("&lt;script&gt;") == 5
    assert 'points="3.0,29.0 80.0,20.3 157.0,3.0"' in page and f"since {now.astimezone():%Y-%m-%d %H:%M}" in page
    line = recipes_page.as_markdown(found, now).splitlines()[5]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 7 and "Failed" in line  # cells
    assert "▁▃█ 1" in recipes_page.as_markdown(found, now)
    assert "▁▃█  versions 1 to 3, the last 1" in as_text(found, now)


def test_nothing_runs(home: Path, recipes: Path) -> None:
    found = status()
    assert {part.name: part.up for part in found.parts} == {"Prefect": False, "MLflow": True, "webhooks": False}
    assert found.running is found.scheduled is found.finished is None and found.recipes == []
    assert main(["status"]) == 1 and main(["status", "--check"]) == status_data.DOWN
    text = as_text(found, datetime.now(UTC))
    assert text.count("is not running; `lewis up` starts it") == 5 and "none in the folder of recipes" in text


def test_a_recipe_that_is_not_in_the_folder(home: Path, recipes: Path, tmp_path: Path) -> None:
    """The folder was said to have none."""
    (recipes / "tiny.yaml").write_text(RECIPE % "tiny")
    (tmp_path / "other.yaml").write_text(RECIPE % "other")
    path = str(tmp_path / "other.yaml")
    assert [(each.recipe, each.registered) for each in status(path, hub=False).recipes or []] == [(path, "other")]
    assert [each.recipe for each in status("tiny", hub=False).recipes or []] == ["tiny"]


def test_the_note_of_a_service_that_died(home: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = {"prefect": "http://127.0.0.1:9/api", "mlflow": "http://127.0.0.1:9", "webhook": "http://127.0.0.1:9"}
    (home / "service.json").write_text(json.dumps(note | {"pid": 1}))
    found = status()
    assert {part.name for part in found.parts if part.state == "does not answer (ConnectError)"} == {
        "Prefect",
        "MLflow",
        "webhooks",
    }
    assert found.unknown == {"runs": "Prefect does not answer (ConnectError)"}
    monkeypatch.setenv("LEWIS_WEBHOOK_URL", "http://127.0.0.1:10/webhook")
    assert part(status(), "webhooks").url == "http://127.0.0.1:10/webhook"
    (home / "service.json").write_text("{")
    assert not part(status(), "Prefect").up


def test_what_cannot_be_asked_is_told_beside_what_can(
    hub: LocalHub, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipes / "broken.yaml").write_text(RECIPE.replace("merge_method", "merge_metod") % "x")
    (recipes / "good.yaml").write_text(RECIPE % "good")
    (recipes / "plain.yaml").write_text(RECIPE.split("register:")[0].replace("org/math", "org/none"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # its own client would try for minutes
    found = status()
    broken, good, plain = found.recipes or []
    assert "merge_metod" in broken.unknown[0] and broken.inputs == []
    assert good.unknown == ["the champion: MLflow does not answer (ConnectError)"] and good.inputs[0].head
    assert plain.registered == "" and "org/none" in plain.unknown[0] and plain.inputs[0].head is None
    text = as_text(found, datetime.now(UTC))
    assert "Recipe good: good, champion unknown" in text and "Recipe plain: registers nothing" not in text
    monkeypatch.setenv("LEWIS_RECIPES", str(recipes / "none"))
    assert "LEWIS_RECIPES" in status().unknown["recipes"]


def test_runs_and_what_comes_next(home: Path, recipes: Path, client: SyncPrefectClient) -> None:
    (recipes / "night.yaml").write_text((RECIPE % "night").replace("org/", "./"))
    soon = datetime.now(UTC) + timedelta(minutes=30)
    flow_id = client.create_flow(_merge)
    deployment = client.create_deployment(flow_id, "night", parameters={"recipe": "night"})
    for hours in (1, 0):  # the later one is created first
        client.create_flow_run_from_deployment(
            deployment, state=Scheduled(scheduled_time=soon + timedelta(hours=hours))
        )
    started(client, str(recipes / "night.yaml"), "older", Running(), Completed())
    started(client, "night", "newer", Running(), Failed(message="org/math: the Hub refuses [404]"))
    started(client, "night", "going on", Running())
    started(client, "night", "tried", Running(), Completed(), flow=_search)
    started(client, "night", "tries", Running(), flow=_search)
    started(client, "night", "skipped", Scheduled(), Completed(name="Skipped"))  # the log of none, in `lewis logs`
    last = last_run(client, "night")
    assert last and last.name == "tries"

    (going,) = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"name": {"any_": ["going on"]}}))
    (home / "runs").mkdir()
    (home / "runs" / str(going.id)).write_text(f"{recipes / 'night.yaml'}\nwaits")
    found = status()
    assert part(found, "Prefect").state == "answers"
    run, search = [run for run in found.running or [] if run.recipe == "night"]
    assert (run.name, run.state) == ("going on", "Running") and run.since and search.name == "tries"
    assert run.message.startswith("waits for its turn") and not search.message
    (run,) = [run for run in found.scheduled or [] if run.recipe == "night"]
    assert (run.deployment, run.state, run.since) == ("night", "Scheduled", soon)
    search, run = [run for run in found.finished or [] if run.recipe == "night"]
    assert (search.name, search.state) == ("tried", "Completed")
    assert (run.name, run.state, run.message) == ("newer", "Failed", "org/math: the Hub refuses [404]")
    text = as_text(found, datetime.now(UTC), 200)
    assert "in 30 min (" in text and "the Hub refuses [404]" in text
    assert Status.model_validate_json(found.model_dump_json()) == found

    (night,) = found.recipes or []
    assert (night.settled, night.attempt(soon)) == (None, "")  # one goes on
    one = status("night", hub=False)
    assert [each.name for each in one.finished or []] == ["tried", "newer", "older"]
    assert {each.recipe for each in [*(one.running or []), *(one.scheduled or [])]} == {"night"}
    for ended in ("newer", "newest"):  # the artifact that each merge brings up to date
        recipes_page.keep()
        wanted = ArtifactFilter.model_validate({"key": {"any_": [recipes_page.KEY]}})
        (page,) = client.read_artifacts(artifact_filter=wanted)
        assert "| `night` | none yet |" in str(page.data) and ("slept" in str(page.data)) == (ended == "newest")
        started(client, "night", "newest", Running(), Completed(name="Rejected", message="slept"))
    with pytest.raises(SystemExit, match="2"):
        main(["status", "night", "--watch", "--check"])
    assert main(["status", "nigth"]) == main(["status", "night", "--watch"]) == 2


def test_a_run_that_many_of_other_recipes_came_after_is_found(
    home: Path, recipes: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failures of all but the last two hundred were shown nowhere, and the check found nothing wrong."""
    for module in ("lewis_tasks.support.flow_run", "lewis_flows.service.status"):
        monkeypatch.setattr(f"{module}.PAGE", 1)
    for name in ("rare", "often"):
        (recipes / f"{name}.yaml").write_text((RECIPE % name).replace("org/", "./"))
        tags, given = [f"recipe:{name}"], {"recipe": name}
        client.create_flow_run(_merge, name=f"merge {name}", parameters=given, tags=tags, state=Failed())
    found = status(hub=False)
    assert [run.recipe for run in found.finished or []] == ["often", "rare"]
    assert {
        each.about for each in status_data.problems(found, datetime.now(UTC)) if each.code == status_data.FAILED
    } == {
        "often",
        "rare",
    }
    assert [run.name for run in status("rare", hub=False).finished or []] == ["merge rare"]


def test_the_work_pool_and_its_worker(home: Path, recipes: Path, client: SyncPrefectClient) -> None:
    pool = "work pool lewis"
    assert "does not exist" in part(status(), pool).state
    client.create_work_pool(WorkPoolCreate(name="lewis", type="process"))
    try:
        found = part(status(), pool)
        assert "has no worker" in found.state and not found.up
        client.send_worker_heartbeat("lewis", "one")
        now = status()
        assert part(now, pool).state == "1 worker" and part(now, pool).up
        assert not [each for each in now.parts if "queue" in each.name]
        client.create_work_queue("gpu", work_pool_name="lewis")
        found = part(status(), "work queue gpu")
        assert "--work-queue gpu`" in found.state and not found.up
        client.get_scheduled_flow_runs_for_work_pool("lewis", ["gpu"])  # as a worker of this queue does
        deadline = time.monotonic() + 240
        while client.read_work_queue_by_name("gpu", "lewis").status != WorkQueueStatus.READY:
            assert time.monotonic() < deadline
            time.sleep(2)
        now = status()
        assert part(now, "work queue gpu").state == "has a worker" and not part(now, "work queue default").up
        client.update_work_queue(client.read_work_queue_by_name("gpu", "lewis").id, is_paused=True)
        assert "prefect work-queue resume gpu --pool lewis" in part(status(), "work queue gpu").state
        client.create_work_pool(WorkPoolCreate(name="scoring", type="kubernetes"))
        scoring = client.create_deployment(
            client.create_flow_from_name("evaluate"), "evaluate", work_pool_name="scoring"
        )
        assert "`prefect worker start --pool scoring`" in part(status(), "work pool scoring").state
        client.delete_deployment(scoring)
        client.update_work_pool("lewis", WorkPoolUpdate(is_paused=True))
        assert "is paused" in part(status(), pool).state
    finally:
        for name in ("lewis", "scoring"):
            client.delete_work_pool(name)


def test_times_as_a_person_says_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Kolkata")  # UTC + 5:30
    time.tzset()
    try:
        now = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
        told: dict[Any, str] = {
            timedelta(seconds=40): "in 40 s (17:30)",
            timedelta(minutes=5, seconds=20): "in 5 min (17:35)",
            -timedelta(minutes=3): "3 min ago (17:27)",
            timedelta(hours=9, minutes=50): "in 10 h (2026-03-02 03:20)",
            -timedelta(days=3): "3 days ago (2026-02-26 17:30)",
        }
        assert {span: moment(now + span, now) for span in told} == told
    finally:
        monkeypatch.undo()
        time.tzset()
