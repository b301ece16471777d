"""The page of metrics, read with Prometheus's own parser: real numbers, and what is left out when a part is away."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import TaskRunCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, Running
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lewis import store
from lewis.evaluation.gate import Verdict
from lewis.registry import history, promotion, tracking
from lewis.registry.releases import Held
from lewis.serving import records, slots
from lewis.serving.records import Served
from lewis.store import size
from lewis.store.secrets import METRICS_KEY
from lewis_flows.release_event import announce
from lewis_flows.service import webhook
from lewis_flows.service.metrics import of_prefect, of_registry, page
from lewis_flows.service.metrics.of_prefect import Step
from lewis_flows.service.metrics.of_registry import Release
from lewis_flows.service.metrics.page import Source
from tests.conftest import Family
from tests.support.lineage import make_home, registered

NOW = datetime(2026, 1, 8, tzinfo=UTC)


@flow(name="merge")
def merge(recipe: str) -> None:
    """Stands for the merge in the server's records."""


def numbers(text: bytes) -> dict[str, float]:
    """`name{value of a label,...}` -> value, of a page; the labels come in the order of their names."""
    return {
        f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@pytest.fixture
def client(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        yield client


def test_what_happened_is_on_the_page(
    tmp_path: Path, empty_database: Path, family: Family, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path / "home", empty_database, monkeypatch)
    (tmp_path / "recipes").mkdir()
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    name = f"metered{uuid4().hex[:8]}"  # no other test of this server has it
    (tmp_path / "recipes" / f"{name}.yaml").write_text("merge_method: ties\nregister: {name: model}\n")
    (tmp_path / "recipes" / "broken.yaml").write_text("merge_method: ties\nregister: {name: broken}\n")
    run = client.create_flow_run(merge, parameters={"recipe": name}, state=Running())
    for state, made in ((Completed(name="Cached"), 3), (Failed(), 1)):
        for number in range(made):
            new = TaskRunCreate(
                name="score", flow_run_id=run.id, task_key=f"{name}-1a2b", dynamic_key=f"{state.name}{number}"
            )
            id_ = client.request("POST", "/task_runs/", json=new.model_dump(mode="json")).json()["id"]
            client.set_task_run_state(UUID(id_), Running(), force=True)
            client.set_task_run_state(UUID(id_), state, force=True)
    client.set_flow_run_state(run.id, Completed(name="Rejected"), force=True)
    skipped = client.create_flow_run(merge, parameters={"recipe": name}, state=Running())
    client.set_flow_run_state(skipped.id, Completed(name="Skipped"), force=True)  # it is no last run
    announce(name, "org/math", "org/math", None, "a" * 40)
    version = registered(family.base, "a", {"org/math": "a" * 40}, "model")
    with tracking.client("a score") as mlflow:
        mlflow.log_metric(version.run_id, "merged/acc", 0.5)
    promotion.promote(version, Verdict(True, (), "base", metric="acc"))
    now = datetime.now(UTC)
    ago = now - timedelta(minutes=5)
    seen = {"commits": {name: {"org/math": [["b" * 40, ago.isoformat()], ["c" * 40, now.isoformat()]]}}}
    (home / "behind.json").write_text(json.dumps(seen))
    poll = {"time": (now - timedelta(seconds=30)).isoformat(), "problems": {"broken": "models: missing"}}
    (home / "last-poll.json").write_text(json.dumps(poll))
    (home / "scores").mkdir()
    (home / "scores" / "x.json").write_bytes(b"x" * 5000)

    with tracking.client("a target") as mlflow:
        mlflow.create_registered_model("broken", {f"{history.TAG}x": "a note, which hides no other model"})
        record = Served("model", "vllm", "vllm").took(version.uri, "a" * 64, "model-1", "")
        records.write(mlflow, record.refused("models:/model/2", "no room"))
        records.write(mlflow, Served("model", "local", "local").took(version.uri, "a" * 64, "model-1", ""))
    running = slots.Running("model-1", "http://127.0.0.1:2", ready=True, share=100)
    slots.note(slots.Now(store.writer(), "http://127.0.0.1:1", "vllm", {"blue": running}))

    deadline, found = time.monotonic() + 120, dict[str, float]()
    lag = f"lewis_release_to_champion_seconds{{model,{name}}}"
    shown = page.Page(page.default_sources())
    awaited = {lag, f"lewis_runs{{merge,rejected,{name}}}", f"lewis_releases{{{name}}}", "lewis_store_free_bytes{}"}
    while not awaited <= found.keys() and time.monotonic() < deadline:
        time.sleep(1)
        found = numbers(shown.text())  # the server writes events late
        for source in shown._sources:
            source._kept = 0.0
    assert found[f"lewis_runs{{merge,rejected,{name}}}"] == 1
    assert time.time() - 200 < found[f"lewis_last_run_timestamp_seconds{{rejected,{name}}}"] < time.time()
    assert [found[f"lewis_steps{{{outcome},{name},{name}}}"] for outcome in ("cached", "failed")] == [3, 1]
    assert 0 <= found[f"lewis_step_seconds{{{name},{name}}}"] < 60
    assert found[f"lewis_releases{{{name}}}"] == 1
    assert found[f"lewis_champion_version{{model,{name}}}"] == 1
    assert found[f"lewis_served_version{{model,{name},vllm}}"] == found[f"lewis_serve_failed{{model,{name},vllm}}"] == 1
    assert found[f"lewis_served_share{{model,{name},local}}"] == 1
    assert time.time() - 200 < found[f"lewis_served_since_seconds{{model,{name},local}}"] < time.time()
    assert found[f"lewis_versions_waiting{{model,{name}}}"] == 0
    assert found[f"lewis_champion_score{{acc,model,{name}}}"] == found[f"lewis_last_score{{acc,model,{name}}}"] == 0.5
    behind, newest = (found[f"lewis_{what}_seconds{{{name}}}"] for what in ("champion_behind", "newest_missed"))
    assert 299 < behind < 600 and 0 <= newest < behind - 299
    assert found["lewis_poll_problem{broken}"] == 1 and 20 < found["lewis_last_poll_age_seconds{}"] < 300
    assert 0 < found[lag] < 600
    assert found["lewis_store_bytes{scores}"] == 512 * (home / "scores" / "x.json").stat().st_blocks > 0
    assert found["lewis_store_free_bytes{}"] > 0
    assert [found[f"lewis_source_up{{{name}}}"] for name in ("poll", "prefect", "mlflow", "store")] == [1] * 4
    (tmp_path / "recipes" / f"{name}.yaml").unlink()  # else a failed last run is an alert for good
    families = {family.name: family for family in of_prefect.Prefect().read()}
    last = families["lewis_last_run_timestamp_seconds"].samples
    assert name not in {sample.labels["recipe"] for sample in last}


def test_a_score_that_was_replaced_is_on_the_next_page(
    tmp_path: Path, empty_database: Path, family: Family, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one stayed: none before the verdict, or one on a part of the documents."""
    make_home(tmp_path / "home", empty_database, monkeypatch)
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "scored.yaml").write_text("merge_method: ties\nregister: {name: model}\n")
    version = registered(family.base, "a", {"org/math": "a" * 40}, "model")
    (source,) = [each for each in page.default_sources() if each.name == "mlflow"]

    def score() -> list[float]:
        return [sample.value for of in source._read() if of.name == "lewis_champion_score" for sample in of.samples]

    def champions() -> list[float]:
        return [each.value for of in source._read() if of.name == "lewis_champion_version" for each in of.samples]

    def log(value: float) -> None:
        with tracking.client("a score") as mlflow:
            mlflow.log_metric(version.run_id, "merged/acc", value)

    promotion.promote(version, Verdict(True, (), "base", metric="acc"))
    assert score() == [] and champions() == [1]
    log(0.5)
    assert score() == [0.5]
    log(0.75)
    assert score() == [0.75]
    with tracking.client("a person") as mlflow:
        mlflow.delete_model_version("model", "1")
    assert champions() == [0]


def test_each_recipe_of_a_group_has_its_own_targets_on_the_page(
    tmp_path: Path, empty_database: Path, family: Family, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two targets of one name: both recipes had the numbers of one of them, which hid what failed at the other."""
    make_home(tmp_path / "home", empty_database, monkeypatch)
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    (tmp_path / "recipes").mkdir()
    for name in ("one", "two"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text("register: {name: model, group: g}\n")
    version = registered(family.base, "a", {"org/math": "a" * 40}, "model")

    def failed() -> dict[tuple[str, str], float]:
        """(Recipe, target) -> whether it failed."""
        samples = [sample for of in of_registry.read() if of.name == "lewis_serve_failed" for sample in of.samples]
        return {(each.labels["recipe"], each.labels["target"]): each.value for each in samples}

    for well, wrong in (("one", "two"), ("two", "one")):
        with tracking.client("targets") as mlflow:
            took = Served("model", "vllm", "vllm", recipe=well).took(version.uri, "a" * 64, "model-1", "")
            records.write(mlflow, took)
            records.write(mlflow, Served("model", "vllm", "vllm", recipe=wrong).refused(version.uri, "no room"))
        assert failed() == {(well, "vllm"): 0, (wrong, "vllm"): 1}
    with tracking.client("a target of one recipe") as mlflow:
        records.write(mlflow, replace(took, target="web", recipe="one"))
    assert failed() == {("one", "vllm"): 1, ("one", "web"): 0, ("two", "vllm"): 0}
    (tmp_path / "recipes" / "one.yaml").unlink()  # what its targets serve is of the model still
    assert failed() == {("one", "vllm"): 1, ("one", "web"): 0, ("two", "vllm"): 0}


def test_only_new_tasks_are_asked_for_and_old_ones_forgotten() -> None:
    def step(number: int, end: datetime) -> tuple[UUID, Step]:
        return UUID(int=number), Step(None, "merge", "completed", end, 2)

    steps, asked = [step(1, NOW), step(2, NOW + timedelta(hours=1))], []

    def ended(client: object, after: datetime) -> list[tuple[UUID, Step]]:
        asked.append(after)
        return [each for each in steps if each[1].time >= after]

    recent, later = of_prefect.Recent(ended), NOW + timedelta(hours=2)
    assert len(recent.read(None, later)) == 2  # type: ignore[arg-type]
    steps.append(step(3, later))
    assert len(recent.read(None, later)) == 3  # type: ignore[arg-type]
    assert asked == [later - of_prefect.WINDOW, NOW + timedelta(hours=1) - of_prefect._LATE]
    assert len(recent.read(None, NOW + timedelta(hours=24.5))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("held, took", [("one", 1), ("two", 25), ("base+two", 25), ("other", None)])
def test_how_long_a_release_took_to_the_champion(held: str, took: float | None) -> None:
    """Two releases of one model, 72 and 48 hours ago; the champion became that an hour after the first."""
    seen = [
        Release("tiny", "org/math", "two", NOW - timedelta(hours=48)),
        Release("tiny", "org/math", "one", NOW - timedelta(hours=72)),
    ]
    champion = Held("1", "", "", (), {of_registry.releases.lineage.source_tag("org/math"): held})
    promoted = NOW - timedelta(hours=71 if held == "one" else 23)
    found = of_registry._took(seen, champion, promoted)
    assert found == (None if took is None else took * 3600)


def test_a_source_that_fails_or_hangs_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PATIENCE", 0.05)
    hangs, answers = threading.Event(), iter(["first"])

    def read(name: str) -> list[page.Metric]:
        if name == "hangs":
            hangs.wait(120)
        elif name == "breaks":
            next(answers)
        metric = page.Metric(f"of_{name}", "", "gauge")
        metric.add_sample(f"of_{name}", {}, 1.0)
        return [metric]

    one = page.Page([Source(name, lambda name=name: read(name), 0.0) for name in ("well", "hangs", "breaks")])
    up = "lewis_source_up{%s}"
    first, second = numbers(one.text()), numbers(one.text())
    assert (first["of_well{}"], first["of_breaks{}"], "of_hangs{}" in first) == (1, 1, False)
    assert [first.get(up % name) for name in ("well", "hangs", "breaks")] == [1, None, 1]
    assert second["of_breaks{}"] == 1 and [second[up % name] for name in ("well", "breaks")] == [1, 0]
    monkeypatch.setattr(page, "FORGET", 0.0)
    last = numbers(one.text())
    assert "of_breaks{}" not in last, "it is too old"
    assert last[up % "hangs"] == 0, "no alert was ever sent"
    hangs.set()


def test_nobody_reads_it_without_its_own_key(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = METRICS_KEY.read()
    assert key == METRICS_KEY.read() and (home / "metrics-key").stat().st_mode & 0o077 == 0
    with TestClient(webhook.create_app("hook", key, page.Page([]))) as client:
        for given in (None, "Bearer ", "Bearer hook", key, f"Basic {key}"):
            answer = client.get("/metrics", headers={"Authorization": given} if given else {})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (
                401,
                "Bearer",
            ) and key not in answer.text
        answer = client.get("/metrics", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    with TestClient(webhook.create_app("hook", "", page.Page([]))) as client:
        assert client.get("/metrics", headers={"Authorization": "Bearer "}).status_code == 401


def test_a_hard_link_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "store"
    monkeypatch.setenv("LEWIS_HOME", str(home))
    for folder in ("merged", "mlflow"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "merged" / "w").write_bytes(b"x" * 8192)
    (home / "mlflow" / "w").hardlink_to(home / "merged" / "w")
    (home / "mlflow" / "gone").symlink_to("/nowhere")
    found = size.by_folder()
    assert found == {"": 0, "merged": 512 * (home / "merged" / "w").stat().st_blocks, "mlflow": 0}
    assert size.total() == sum(found.values())
