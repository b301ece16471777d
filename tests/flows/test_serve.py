"""The champion goes into service by a run of its own, which its promotion starts."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import ArtifactSort
from prefect.states import Completed, Scheduled

from lewis.errors import LewisError
from lewis.registry import history, outbox, promotion, versions
from lewis.serving import canary, haproxy, records, service
from lewis.serving.records import served
from lewis_flows import prefect_runs, recipes_folder, run_page, secret_blocks
from lewis_flows.cli.main import main
from lewis_flows.serve import serve_flow
from lewis_flows.service import keep_served
from lewis_flows.service.deploy import Follower
from lewis_tasks.support import moves
from lewis_tasks.support.flow_run import result_of_run
from tests.conftest import Family
from tests.support.deployed import deploying
from tests.support.http_sink import HttpSink
from tests.support.lineage import crowned, with_tokenizer
from tests.support.lora_server import LoraServer
from tests.support.routed import routed

RECIPE = """
merge_method: ties
base_model: org/base
models: [{model: org/math}]
register: {name: tiny}
serve:
  - {kind: command, run: %s}
  - {kind: webhook, url: "%s/hook"}
"""
PAGE = "<!doctype html>\n<html><body><main>\n<section>the scores</section>\n</main></body></html>\n"
FAILS = "import pathlib, sys; sys.exit('no room' if pathlib.Path(%r).exists() else 0)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "recipes"
    path.mkdir()
    monkeypatch.setenv("LEWIS_RECIPES", str(path))
    return path


@pytest.fixture
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    with deploying(prefect_url) as client:
        yield client


def test_the_targets_get_the_champion_in_their_order(
    folder: Path,
    home: Path,
    family: Family,
    client: SyncPrefectClient,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails, program = tmp_path / "fails", tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{FAILS % str(fails)}\n")
    program.chmod(0o755)
    monkeypatch.setenv("LEWIS_SERVE_PROGRAMS", str(tmp_path))
    with HttpSink() as sink:
        (folder / "nightly.yaml").write_text(RECIPE % ("[program]", sink.url))

        def run(again: bool = False) -> Any:
            state = serve_flow("nightly", again, return_state=True)
            return state.name, result_of_run(state)

        assert run()[0] == "Completed" and sink.received == []  # no champion yet
        first = crowned(family.base, "a").version.uri
        name, report = run()
        assert (name, report.version, report.changed) == ("Served", first, ["command", "webhook"])
        assert run()[0] == "Cached" and len(sink.received) == 1

        fails.touch()
        second = crowned(family.base, "b").version.uri
        with pytest.raises(LewisError, match=r"tiny/2 is not in service at command, models:/tiny/1 stays .*no room"):
            run()
        assert len(sink.received) == 1, "the receiver is not told of what is not in service"
        assert main(["served"]) == 0
        shown = capsys.readouterr().out
        assert "tiny command: v1 since " in shown and "; v2 failed " in shown and "no room" in shown
        fails.unlink()
        assert run()[0] == "Served" and [each.uri for each in served("tiny")] == [second, second]
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
        assert main(["rollback", "tiny", "--why", "it was rude"]) == 0
        told = capsys.readouterr().err
        assert (
            "command still has models:/tiny/2: no service runs here; `lewis serve`" in told and "webhook still" in told
        )
        assert run()[1].version == first and len(sink.received) == 3
        assert [each.json["data"]["version"] for each in sink.received] == ["1", "2", "1"]
        assert len({each.headers["x-mlflow-delivery-id"] for each in sink.received}) == 3
        assert main(["served", "--json"]) == 0
        (_, hook) = json.loads(capsys.readouterr().out)
        assert (hook["uri"], hook["previous"], hook["failure"]) == (first, second, None)


def test_a_run_whose_version_is_rolled_back_meanwhile_ends_and_leaves_the_rest_to_the_next(
    folder: Path, home: Path, family: Family, client: SyncPrefectClient
) -> None:
    """The targets after the rollback got the version that was rolled back, and so did those with a canary."""
    with HttpSink() as first, HttpSink() as second:
        text = (RECIPE % ("[x]", "http://x")).partition("serve:")[0]
        targets = [{"kind": "webhook", "name": name, "url": sink.url} for name, sink in (("a", first), ("b", second))]
        (folder / "nightly.yaml").write_text(f"{text}serve: {json.dumps(targets)}")
        crowned(family.base, "a")
        assert serve_flow("nightly", return_state=True).name == "Served"
        crowned(family.base, "b")

        def roll_back(request: Any) -> object:
            promotion.rollback("tiny", "it was rude")
            return {}

        answers, first.answer = first.answer, roll_back
        state = serve_flow("nightly", return_state=True)
        first.answer = answers
        report = result_of_run(state)
        assert (state.name, report.outdated, report.changed) == ("Outdated", True, ["a"])
        assert state.message == "models:/tiny/2 is not the champion any more; the next run serves the new one"
        assert [each.failure for each in served("tiny")] == [None, None]
        report = result_of_run(serve_flow("nightly", return_state=True))
        assert (report.version, report.changed) == ("models:/tiny/1", ["a"])
        assert [len(each.received) for each in (first, second)] == [3, 1]


def test_a_promotion_starts_the_deployment_and_is_sent_until_it_has(
    folder: Path, home: Path, family: Family, client: SyncPrefectClient
) -> None:
    recipe = folder / "nightly.yaml"
    recipe.write_text(RECIPE % ("[x]", "http://127.0.0.1:9"))
    follower = Follower(lambda line: None)
    follower.deploy()
    made = client.read_deployment_by_name("serve/nightly")
    assert made.parameters == {"recipe": "nightly"} and made.global_concurrency_limit.limit == 1
    assert made.entrypoint == "lewis_flows.serve.serve_flow"

    def runs() -> list[Any]:
        return [run for run in client.read_flow_runs() if run.deployment_id == made.id]

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    assert len(runs()) == 1, "a recipe that is new may have a champion already"
    follower.deploy()
    client.set_flow_run_state(runs()[0].id, Completed(), force=True)
    time.sleep(3)  # the server's triggers learn of the automation
    crowned(family.base, "a")
    moves.report(patience=60)
    assert outbox.moves() == []
    wait(lambda: len(runs()) == 2)

    recipe.write_text(recipe.read_text().replace("tiny", "other"))
    follower.deploy()
    (automation,) = [each for each in client.read_automations() if each.name.startswith("service of ")]
    assert "other" in automation.name
    recipe.write_text(recipe.read_text().partition("serve:")[0])
    follower.deploy()
    assert prefect_runs.deployment(client, "serve/nightly") is None
    assert not [each for each in client.read_automations() if each.name.startswith("service of ")]


def end_runs(client: SyncPrefectClient, recipe: str) -> UUID:
    """End the runs of a recipe's deployment `serve`, and no others on the server that tests share; its id."""
    made = client.read_deployment_by_name(f"serve/{recipe}").id
    for run in client.read_flow_runs():
        if run.deployment_id == made and not run.state.is_final():
            client.set_flow_run_state(run.id, Completed(), force=True)
    return made


@pytest.mark.long
def test_a_server_that_lost_its_model_gets_it_back_and_one_that_refused_it_is_left_alone(
    folder: Path, home: Path, family: Family, client: SyncPrefectClient, tmp_path: Path
) -> None:
    def runs() -> list[Any]:
        made = prefect_runs.deployment(client, "serve/nightly")
        found = [run for run in client.read_flow_runs() if made and run.deployment_id == made.id]
        return [run for run in found if run.state.is_scheduled()]

    def looks() -> bool:
        started = keep_served.look() == ["nightly"]
        assert len(runs()) == started and not keep_served.look(), "one is enough"
        end_runs(client, "nightly")
        return started

    assert keep_served.look() == []
    adapter = with_tokenizer(family.lora, tmp_path / "adapter")
    with LoraServer("tiny") as server:
        text = (RECIPE % ("[x]", "http://x")).partition("serve:")[0]
        text += f"output: {{kind: lora, rank: 4}}\nserve: {{kind: vllm, url: '{server.url}'}}\n"
        (folder / "nightly.yaml").write_text(text)
        Follower(lambda line: None).deploy()
        end_runs(client, "nightly")
        assert not looks(), "there is no champion"
        crowned(adapter, "a", base=family.base)
        assert looks(), "a move that nobody was told of"
        assert serve_flow("nightly", return_state=True).name == "Served" and not looks()
        server.models = {"base": "base"}
        assert looks(), "it was started again"
        serve_flow("nightly", return_state=True)
        crowned(adapter, "b", base=family.base)
        server.statuses = [200, 400]
        with pytest.raises(LewisError, match="answered 400"):
            result_of_run(serve_flow("nightly", return_state=True))
        assert not looks(), "it would be refused again"
        client.pause_deployment(client.read_deployment_by_name("serve/nightly").id)
        crowned(adapter, "c", base=family.base)
        assert not looks()
    assert not keep_served.look(), "the server is away"


def test_a_recipe_that_cannot_be_looked_at_does_not_stop_the_others(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No target of any recipe got its model back, as long as there was such a recipe."""

    def fails(*_: object) -> None:
        raise RuntimeError("what no one expects")

    text = RECIPE % ("[x]", "http://x")
    for name in ("bad", "good", "plugin"):
        (folder / f"{name}.yaml").write_text(text.replace("tiny", name))
    load, put = recipes_folder.load, monkeypatch.setattr
    put(recipes_folder, "load", lambda name: fails() if name == "plugin" else load(name))
    put(secret_blocks, "load_for_serving", lambda: None)
    put(service, "champion_of", lambda plan: plan.register_as.model)
    put(service, "is_due", lambda targets, champion, owner: fails() if champion == "bad" else True)
    put(keep_served, "get_client", lambda **_: nullcontext())
    put(keep_served, "_start", lambda client, name: True)
    assert keep_served.look() == ["good"]
    assert "bad: its targets are left out: RuntimeError: what no one expects" in caplog.text


@pytest.mark.long
def test_two_recipes_of_a_group_serve_their_targets_once(
    folder: Path, home: Path, family: Family, client: SyncPrefectClient
) -> None:
    """Each removed the other's records and was then served again, every minute without end."""
    with HttpSink() as first, HttpSink() as second:
        for name, sink in (("one", first), ("two", second)):
            text = (RECIPE % ("[x]", "http://x")).partition("serve:")[0].replace("name: tiny", "name: tiny, group: g")
            (folder / f"{name}.yaml").write_text(f"{text}serve: {{kind: webhook, url: '{sink.url}'}}\n")
        Follower(lambda line: None).deploy()
        for name in ("one", "two"):
            end_runs(client, name)
        champion = crowned(family.base, "a").version.uri
        for name in ("one", "two"):
            assert serve_flow(name, return_state=True).name == "Served"
        assert keep_served.look() == [] and len(first.received) == len(second.received) == 1
        assert [(each.recipe, each.uri) for each in served("tiny")] == [("one", champion), ("two", champion)]


def deployed_alone(folder: Path, client: SyncPrefectClient) -> UUID:
    """Deploy the recipe `nightly`, and end the runs that this starts; the id of its deployment `serve`."""
    (folder / "nightly.yaml").write_text(RECIPE % ("[x]", "http://127.0.0.1:9"))
    Follower(lambda line: None).deploy()
    return end_runs(client, "nightly")


def test_a_run_that_a_schedule_plans_for_later_does_not_keep_the_model_from_its_server(
    folder: Path, home: Path, client: SyncPrefectClient
) -> None:
    made = deployed_alone(folder, client)
    client.create_deployment_schedules(made, [(CronSchedule(cron="0 3 * * *"), True)])
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": made}, json={})
    assert any(run.auto_scheduled and run.deployment_id == made for run in client.read_flow_runs())
    assert keep_served._start(client, "nightly") and not keep_served._start(client, "nightly")


def test_a_run_that_a_person_plans_for_later_does_not_keep_the_model_from_its_server(
    folder: Path, home: Path, client: SyncPrefectClient
) -> None:
    made = deployed_alone(folder, client)
    later = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=1))
    client.create_flow_run_from_deployment(made, state=later)
    assert keep_served._start(client, "nightly") and not keep_served._start(client, "nightly")


def artifact(client: SyncPrefectClient, key: str) -> str:
    """The newest artifact of a key."""
    wanted = ArtifactFilter.model_validate({"key": {"any_": [key]}})
    return str(client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC)[0].data)


@pytest.mark.skipif(not shutil.which("haproxy"), reason="there is no haproxy; Debian has it in the package haproxy")
@pytest.mark.long
def test_a_version_that_fails_a_canary_is_rolled_back_with_its_numbers(
    folder: Path, home: Path, family: Family, client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "sleep", lambda _: time.sleep(0.05))
    adapter = with_tokenizer(family.lora, tmp_path / "adapter")
    with routed() as place:
        recipe = yaml.safe_load((RECIPE % ("[x]", "http://x")).partition("serve:")[0])
        target = place.target.model_dump(mode="json", exclude_defaults=True)
        recipe |= {"output": {"kind": "lora", "rank": 4}, "serve": target}
        (folder / "nightly.yaml").write_text(yaml.safe_dump(recipe))
        first = crowned(adapter, "a", base=family.base).version.uri
        assert serve_flow("nightly", return_state=True).name == "Served"
        versions.attach(crowned(adapter, "b", base=family.base).version, {versions.PAGE: PAGE})
        kept = str(run_page.find("tiny/2"))
        made = os.stat(kept).st_mtime
        place.values = {"blue": 0.3, "green": 0.001}
        with pytest.raises(LewisError, match=r"canary at 10 %, 99 requests .* errors 0.3 vs 0.001, FAIL"):
            result_of_run(serve_flow("nightly", return_state=True))
        newest = history.history("tiny")[-1]
        assert (newest.what, newest.version) == ("rolled back", first) and "errors 0.3 vs 0.001, FAIL" in newest.why
        assert haproxy.weights(place.target) == {"blue": 0, "green": 100}
        assert serve_flow("nightly", return_state=True).name == "Cached" and served("tiny")[0].uri == first

        shown = artifact(client, "nightly-canary-haproxy")
        assert "![Canary at haproxy. 10 % of the traffic, 99 requests: errors 0.3 vs 0.001, FAIL" in shown
        assert "| 10 % | 99 | " in shown and "| errors | 0.3 | 0.001 | 0.011 | FAIL |" in shown
        page = run_page.find("tiny/2")  # which was here before the canary
        assert str(page) == kept and page.read_text().count("Into service at haproxy") == 1
        assert page.stat().st_mtime == made  # it is no newer run's
        assert "<td>FAIL</td>" in page.read_text() and "</section><!--end of canary-->\n</main>" in page.read_text()

        third = crowned(adapter, "c", base=family.base).version
        place.values = {}
        assert serve_flow("nightly", return_state=True).name == "Served"
        assert "All 2 steps held" in artifact(client, "nightly-canary-haproxy")
        canary_of = records.canary_of(third, "haproxy")
        assert canary_of and [(each.share, each.passed) for each in canary_of.steps] == [(10, True), (50, True)]


def test_overrides_cannot_say_what_is_served_where(folder: Path) -> None:
    from lewis_flows.recipes_folder import load_for_deployment

    path = folder / "nightly.yaml"
    path.write_text(RECIPE % ("[x]", "http://127.0.0.1:9"))
    with pytest.raises(LewisError, match="a run of a deployment cannot change serve"):
        load_for_deployment(path, ["serve[0].run=[reboot]"])


def test_secrets_may_be_blocks(client: SyncPrefectClient, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.blocks.system import Secret

    from lewis import settings

    for name in ("LEWIS_SERVE_SECRET", "LEWIS_SERVE_KEY"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    saved = Secret(value="signs").save("lewis-serve-secret", overwrite=True)
    secret_blocks.load_for_serving()
    assert (settings.SERVE_SECRET.get(), settings.SERVE_KEY.get()) == ("signs", "")
    client.delete_block_document(saved)
