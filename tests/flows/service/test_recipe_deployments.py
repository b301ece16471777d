"""The deployments always are those that the folder of recipes asks for; what an operator changed stays."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Completed, Pending, Running, Scheduled, Suspended
from prefect.utilities.callables import parameter_schema

from lewis import input_files
from lewis.errors import InputError, LewisError
from lewis.registry import outbox
from lewis.registry.outbox import Move
from lewis_flows import prefect_runs, recipes_folder
from lewis_flows.merge import load, merge_flow
from lewis_flows.release_event import SETTLE
from lewis_flows.search import search_flow
from lewis_flows.service import deploy, recipe_deployments, recipes_page, webhook
from lewis_flows.service.automations import SERVICE_TAG
from lewis_flows.service.deploy import Follower
from lewis_flows.service.recipe_files import Folder
from lewis_flows.service.status_data import Status, Watched
from lewis_flows.turn import absorb, absorb_waiting
from tests.support.deployed import deploying

GOOD = "{merge_method: ties, base_model: org/base, models: [{model: org/math}]}"
SEARCH = """# Keeps the good ones good.
#
# It has a search.
merge_method: ties
base_model: org/base
models: [{model: org/math}]
evaluate: {tasks: [x]}
register: {name: good, team: ops}
search: {space: {parameters.lambda: [1, 2]}, metrics: ["x/acc,none"]}
"""

WORDS = """
task: words
dataset_path: json
dataset_kwargs: {data_files: eval/words/words.jsonl}
process_docs: !function more.rows
metric_list: [{metric: acc}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one recipe that can run."""
    path = tmp_path / "recipes"
    path.mkdir()
    (path / "good.yaml").write_text(GOOD)
    monkeypatch.setenv("LEWIS_RECIPES", str(path))
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LEWIS_MLFLOW_UI", "http://mlflow.example")
    return path


@pytest.fixture
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    with deploying(prefect_url) as client:
        yield client


def test_a_recipe_is_paused_while_the_data_of_its_task_are_missing_and_its_champion_is_served(
    folder: Path, client: SyncPrefectClient
) -> None:
    follower, recipe, data = Follower(print), folder / "good.yaml", folder / "eval" / "words" / "words.jsonl"
    data.parent.mkdir(parents=True)
    (data.parent / "words.yaml").write_text(WORDS)
    (data.parent / "more.py").touch()
    recipe.write_text(SEARCH.replace("[x]", "[eval/words/words.yaml]") + "serve: {kind: command, run: [x]}\n")
    follower.follow()  # a recipe that is new
    made = {flow: client.read_deployment_by_name(f"{flow}/good") for flow in ("merge", "search", "serve")}
    assert follower.runnable() == [] and {flow: each.paused for flow, each in made.items()} == {
        "merge": True,
        "search": True,
        "serve": False,
    }
    about = made["merge"].description or ""
    assert "**It cannot run:** " in about and "data file 'eval/words/words.jsonl' is missing or empty" in about
    assert "It cannot run" not in (made["serve"].description or "")
    data.write_text("{}")
    follower.follow()
    assert follower.runnable() == ["good"]
    for flow, each in made.items():
        found = client.read_deployment_by_name(f"{flow}/good")
        assert (found.id, found.paused, found.tags) == (each.id, False, ["lewis", "recipe:good", "team:ops"])


def test_a_reason_that_a_recipe_cannot_run_is_shown_as_it_is(folder: Path) -> None:
    """A model's name went into the description, which is Markdown, as it was."""
    (folder / "good.yaml").write_text(GOOD.replace("org/base", "./<img src=x>__y__"))
    [file] = Folder().files()
    assert "/<img src=x>__y__" in file.why
    assert r"/\<img src=x\>\_\_y\_\_" in recipe_deployments._description(file, None)


@pytest.mark.parametrize(
    "wrong", ["two files", *(pytest.param(wrong, marks=pytest.mark.long) for wrong in ("large", "not readable"))]
)
def test_a_recipe_whose_file_cannot_be_read_is_paused(
    folder: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """It lost its deployments, with the operator's pause and schedule, and was not paused once it could be read."""
    follower, recipe = Follower(print), folder / "good.yaml"
    recipe.write_text(SEARCH)
    follower.follow()
    names = "merge/good", "search/good"
    made = [client.read_deployment_by_name(name).id for name in names]
    with monkeypatch.context() as patch:
        if wrong == "two files":
            (folder / "good.yml").write_text(SEARCH)
        elif wrong == "large":
            recipe.write_text(f"{SEARCH}{'#' * 1_000_000}")
        else:
            patch.setattr(input_files, "open_regular", Mock(side_effect=PermissionError))
            recipe.chmod(0)
        follower.follow()
    assert follower.runnable() == [] and [client.read_deployment_by_name(name).id for name in names] == made
    found = client.read_deployment_by_name("merge/good")
    assert found.paused and "cannot-run" in found.tags and "It cannot run" in (found.description or "")
    (folder / "good.yml").unlink(missing_ok=True)
    recipe.write_text(SEARCH)
    recipe.chmod(0o600)
    follower.follow()
    assert follower.runnable() == ["good"] and not client.read_deployment_by_name("merge/good").paused
    assert not [run for run in client.read_flow_runs() if run.deployment_id == made[0] and not run.auto_scheduled]


@pytest.mark.parametrize("name", ["Good", pytest.param("good-", marks=pytest.mark.long)])
def test_of_two_names_that_differ_in_case_or_signs_neither_runs(
    folder: Path, client: SyncPrefectClient, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The later one in the alphabet alone was refused: a new file ran in the place of one that was there."""
    follower, new = Follower(print), folder / f"{name}.yaml"
    follower.follow()
    made = client.read_deployment_by_name("merge/good")
    new.write_text(GOOD)
    follower.follow()
    assert follower.runnable() == []
    for mine, other in ((new, "good.yaml"), (folder / "good.yaml", new.name)):
        why = f"{mine.name}: its artifacts and secrets would be those of {other}, whose name differs in case or signs"
        assert f"recipe {mine.stem} is left out: {why}" in caplog.text
        with pytest.raises(InputError, match=re.escape(why)):  # as `lewis status` and the poll read it
            recipes_folder.load(mine.stem)
        with pytest.raises(InputError, match=re.escape(why)):  # as a run reads it
            load(mine, [])
        found = client.read_deployment_by_name(f"merge/{mine.stem}")
        assert found.paused and "cannot-run" in found.tags and "It cannot run" in (found.description or "")
    assert "Traceback" not in caplog.text
    new.rename(folder / "better.yaml")
    follower.follow()
    assert follower.runnable() == ["better", "good"]
    found = client.read_deployment_by_name("merge/good")
    assert (found.id, found.version, found.paused, found.tags) == (made.id, made.version, False, made.tags)
    assert not [run for run in client.read_flow_runs() if run.deployment_id == made.id and not run.auto_scheduled]


def test_a_recipe_has_a_deployment_that_an_operator_can_change(
    folder: Path, client: SyncPrefectClient, caplog: pytest.LogCaptureFixture
) -> None:
    said, recipe = list[str](), folder / "good.yaml"
    follower = Follower(said.append)

    def again() -> list[str]:
        said.clear()
        follower.deploy()
        return said

    def of(name: str = "merge/good") -> Any:
        return client.read_deployment_by_name(name)

    def runs() -> list[FlowRun]:
        return [run for run in client.read_flow_runs() if run.deployment_id == of().id and not run.auto_scheduled]

    assert again() == [] and again() == []
    (schedule,) = of().schedules
    assert (schedule.slug, schedule.schedule.cron, of().parameters) == ("nightly", "0 3 * * *", {"recipe": "good"})
    assert of().concurrency_options.collision_strategy == "ENQUEUE" and of().global_concurrency_limit.limit == 1
    assert prefect_runs.deployment(client, "search/good") is None

    (trigger,) = client.read_automations_by_name("release of good")
    client.delete_automation(trigger.id)  # as if a process had died before it made that
    recipe.write_text(SEARCH)
    assert again() == ["good was edited: it is merged now"]
    tags = ["lewis", "recipe:good", "team:ops"]
    assert of().tags == tags and len(client.read_automations_by_name("release of good")) == 1
    words = "Keeps the good ones good.\n\nIt has a search.\n\nRegisters [ops.good](http://mlflow.example/"
    assert of().description.startswith(words)
    assert of("search/good").schedules == [] and [sorted(run.tags) for run in runs()] == [["edited", *tags]]

    client.pause_deployment(of().id)
    client.update_deployment_schedule(of().id, schedule.id, schedule=CronSchedule(cron="0 4 * * *"))
    recipe.write_text(SEARCH.replace("good ones", "best ones"))
    kept = ["good stays paused, as somebody paused it", "good keeps its own schedule: 0 4 * * *"]
    assert again() == [*kept, "good was edited and is not merged: its deployment is paused"]
    assert of().paused and of().schedules[0].schedule.cron == "0 4 * * *" and len(runs()) == 1
    recipe.write_text("models: [")
    again()
    recipe.write_text(GOOD)
    again()
    assert of().paused  # it was not paused because it was broken
    assert prefect_runs.deployment(client, "search/good") is None

    client.resume_deployment(of().id)
    recipe.write_text("models: [")
    assert "good was edited and is not merged: it is wrong: `lewis status` says where" in again()
    assert of().paused and "It cannot run" in of().description
    recipe.write_text(GOOD)
    assert again() == [kept[1]] and not of().paused and "cannot-run" not in of().tags and len(runs()) == 1

    client.pause_deployment(of().id)
    recipe.rename(folder / "better.yaml")
    with caplog.at_level(logging.INFO):
        again()
    lost = (
        "the deployment merge/good is removed: no recipe asks for it; it was paused, and it had a schedule of its own"
    )
    assert f"{lost}: 0 4 * * *" in caplog.messages
    assert prefect_runs.deployment(client, "merge/good") is None and of("merge/better").name == "better"
    assert client.read_automations_by_name("release of good") == []


def test_what_an_operator_chose_is_named(folder: Path, client: SyncPrefectClient) -> None:
    """A deploy said nothing of another time zone, nor that it took default parameters and a limit away."""
    said = list[str]()
    Follower(said.append).deploy()
    made = client.read_deployment_by_name("merge/good")
    there = CronSchedule(cron="0 3 * * *", timezone="Asia/Tokyo")
    client.update_deployment_schedule(made.id, made.schedules[0].id, schedule=there)
    given = {"recipe": "good", "overrides": ["seed=1"]}
    client.update_deployment(made.id, DeploymentUpdate(parameters=given, concurrency_limit=3))
    Follower(said.append).deploy()
    assert said == [
        "good keeps its own schedule: 0 3 * * * Asia/Tokyo",
        "good has no longer the default parameters that somebody gave it; write them into its file: "
        "{'overrides': ['seed=1']}",
        "good has the concurrency limit 1 again: its runs take turns, whatever the limit",
    ]
    found = client.read_deployment_by_name("merge/good")
    assert (found.schedules[0].schedule, found.parameters) == (there, {"recipe": "good"})


def test_the_page_of_a_recipe_links_its_champion(
    folder: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It linked the registered model alone."""
    recipe, follower = folder / "good.yaml", Follower(print)
    (folder / "other.yaml").write_text(GOOD)
    recipe.write_text(SEARCH)
    follower.deploy()

    def links(name: str = "merge/good") -> str:
        return (client.read_deployment_by_name(name).description or "").rpartition("\n\n")[2]

    def keep(champion: str | None, model: str = "ops.good", *unknown: str) -> str:
        watched = Watched(recipe="good", registered=model, champion=champion, unknown=list(unknown))
        found = Status(parts=[], recipes=[watched, Watched(recipe="other")])
        monkeypatch.setattr(recipes_page, "status", lambda **_: found)
        recipes_page.keep()
        return links()

    def linked(number: str) -> str:
        page = f"http://mlflow.example/#/models/ops.good/versions/{number}?workflowType=machine_learning"
        return f"{none[:-1]}; its champion is [version {number}]({page})."

    none, made = links(), client.read_deployment_by_name("merge/good")
    assert none == "Registers [ops.good](http://mlflow.example/#/models/ops.good?workflowType=machine_learning)."
    assert keep("3") == links("search/good") == linked("3")
    seen = client.read_deployment_by_name("merge/good")
    assert (seen.version, seen.tags, seen.schedules) == (made.version, made.tags, made.schedules)
    assert keep("3") == linked("3") and client.read_deployment_by_name("merge/good").updated == seen.updated
    assert keep(None, "ops.good", "MLflow does not answer") == linked("3")
    assert keep("7", "of.another") == linked("3") and links("merge/other") == ""
    recipe.write_text(SEARCH.replace("Keeps", "Still keeps"))
    follower.deploy()
    assert links() == linked("3")  # MLflow is not asked for it
    assert keep("4") == linked("4")

    now = datetime.now(UTC)
    nights = {"start_time": now.isoformat(), "end_time": (now + timedelta(days=3)).isoformat(), "min_runs": 2}
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": made.id}, json=nights)
    with monkeypatch.context() as patch:
        patch.setattr(recipe_deployments, "_SOON", timedelta(days=2))  # as if the nightly run were due now
        assert keep("5") == linked("4") and links("search/good") == linked("5")
    assert keep("5") == linked("5") and keep(None) == none
    recipe.write_text(SEARCH.replace("name: good", "name: better"))
    assert keep("5") == linked("5")
    follower.deploy()
    assert links() == none.replace("ops.good", "ops.better")


def test_the_page_of_all_recipes_follows_a_deploy_and_a_move_of_a_champion(
    folder: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, look = list[int](), webhook._Look(Follower(print))
    monkeypatch.setattr(recipes_page, "keep", lambda: kept.append(1))
    move = Move("good", "2", None, ["by hand"])

    def looks() -> int:
        look()
        look()
        return len(kept)

    assert looks() == 1
    (folder / "new.yaml").write_text(GOOD)
    assert looks() == 2
    outbox.write(move)  # which may not have happened
    assert looks() == 2
    outbox.write(replace(move, happened=True))
    assert looks() == 3
    outbox.remove(move)
    assert looks() == 3


def test_a_recipe_that_needs_several_gpus_is_in_their_queue_unless_an_operator_chose_another(
    folder: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without a GPU took it, and it failed there."""
    recipe, several = folder / "good.yaml", SEARCH.replace("tasks: [x]", "tasks: [x], gpus: 2")

    def queues(text: str) -> list[str | None]:
        recipe.write_text(text)
        Follower(print).deploy()
        return [client.read_deployment_by_name(f"{flow}/good").work_queue_name for flow in ("merge", "search")]

    def move(queue: str) -> None:
        to = DeploymentUpdate(work_pool_name="lewis", work_queue_name=queue)
        client.update_deployment(client.read_deployment_by_name("merge/good").id, to)

    assert queues(several) == ["default", "default"]  # there is no such queue
    client.create_work_queue("cuda", work_pool_name="lewis")
    assert queues(several) == ["cuda", "cuda"]
    assert "queue:cuda" in client.read_deployment_by_name("merge/good").tags
    assert queues("models: [")[0] == "cuda"
    assert queues(SEARCH) == ["default", "default"] and queues(several) == ["cuda", "cuda"]
    move("night")
    assert queues(SEARCH) == ["night", "default"]
    move("default")
    assert queues(several) == ["default", "cuda"]
    monkeypatch.setenv("LEWIS_EVALUATE_QUEUE", "gpu")  # other workers score
    assert queues(several) == ["default", "default"]


def test_a_release_starts_a_deployment_that_was_deleted_and_made_again(folder: Path, client: SyncPrefectClient) -> None:
    """The automation of the deleted one stayed, so no release and no new champion started anything any more."""
    block = "serve: {kind: webhook, url: 'http://127.0.0.1:9'}"
    (folder / "good.yaml").write_text(SEARCH.replace("search:", f"{block}\n#"))
    names = {"merge/good": "release of good", "serve/good": "service of ops.good by good"}
    for _ in range(2):
        Follower(print).deploy()
        for name, automation in names.items():
            (found,) = client.read_automations_by_name(automation)
            made = client.read_deployment_by_name(name).id
            assert [action.deployment_id for action in found.actions] == [made]  # type: ignore[union-attr]
            client.delete_deployment(made)


def test_a_deployment_stays_while_a_run_of_it_goes_on(folder: Path, client: SyncPrefectClient) -> None:
    """Its limit went with it, and Prefect's server answered the state that ends the run with an error."""
    follower, recipe = Follower(print), folder / "good.yaml"
    recipe.write_text(SEARCH)
    follower.follow()
    search = client.read_deployment_by_name("search/good").id
    begun = client.create_flow_run_from_deployment(search).id
    for state in (Pending(), Running()):
        client.set_flow_run_state(begun, state)
    merge = client.read_deployment_by_name("merge/good").id
    asks = client.create_flow_run_from_deployment(merge, state=Suspended()).id
    recipe.write_text(GOOD)  # no search any more
    follower.follow()
    recipe.unlink()
    follower.follow()
    assert prefect_runs.deployment(client, "merge/good") is None
    assert prefect_runs.deployment(client, "search/good") is not None
    assert recipe_deployments.remove_stale(client, [])
    assert client.read_flow_run(asks).state_name == "Lapsed"  # its answer would have been lost
    client.set_flow_run_state(begun, Completed())
    assert client.read_flow_run(begun).state_name == "Completed"
    assert not recipe_deployments.remove_stale(client, [])
    assert prefect_runs.deployment(client, "search/good") is None


def test_a_run_that_is_about_to_begin_is_cancelled_before_its_deployment_goes(
    folder: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server deleted it, also one that a worker began right then, and logged errors for each of its events."""
    Follower(print).deploy()
    deployment = client.read_deployment_by_name("merge/good").id
    late, later = (
        client.create_flow_run_from_deployment(deployment, state=Scheduled(scheduled_time=datetime.now(UTC) + each)).id
        for each in (timedelta(), timedelta(days=1))
    )
    delete, states = client.delete_deployment, list[str]()

    def look(found: Any) -> None:
        states.extend(str(client.read_flow_run(run).state_name) for run in (late, later))
        delete(found)

    monkeypatch.setattr(client, "delete_deployment", look)
    assert recipe_deployments.remove(client, "merge/good")
    assert states == ["Cancelled", "Scheduled"] and client.read_flow_run(late).state_name == "Cancelled"
    with pytest.raises(ObjectNotFound):
        client.read_flow_run(later)


def test_the_form_of_a_deployment_asks_for_what_the_flow_takes(folder: Path) -> None:
    (file,) = Folder().files()
    for name, flow in (("merge", merge_flow), ("search", search_flow)):
        form = recipe_deployments._fields(name, file, None)["parameter_openapi_schema"]
        assert form["properties"].keys() == parameter_schema(flow).properties.keys()


@pytest.mark.parametrize(("name", "number"), [("trials", 0), ("trials", -3), ("minutes", 0), ("minutes", -1)])
def test_a_search_of_no_trials_is_refused_by_its_form(
    folder: Path, client: SyncPrefectClient, name: str, number: int
) -> None:
    """It measured the models, then ended as `none of 0 trials could be scored`; or made as many as the recipe says."""
    (folder / "good.yaml").write_text(SEARCH)
    Follower(print).deploy()
    deployment = client.read_deployment_by_name("search/good").id
    with pytest.raises(PrefectHTTPStatusError, match=f"{number} is less than"):
        client.create_flow_run_from_deployment(deployment, parameters={"recipe": "good", name: number})


def test_a_run_ends_those_that_wait_behind_it(folder: Path, client: SyncPrefectClient) -> None:
    Follower(print).deploy()
    deployment = client.read_deployment_by_name("merge/good").id
    begins, waits, other, quick = (
        client.create_flow_run_from_deployment(deployment, parameters={"recipe": "good", **given})
        for given in ({"overrides": []}, {"overrides": []}, {"overrides": ["seed=1"]}, {})  # the last: a Quick Run
    )
    released, tonight = (  # a run of a release, and one that a person plans for later: a Custom Run
        client.create_flow_run_from_deployment(deployment, state=Scheduled(scheduled_time=datetime.now(UTC) + ahead))
        for ahead in (SETTLE, timedelta(hours=1))
    )
    with pytest.raises(PrefectHTTPStatusError, match="'bogus' was unexpected"):
        client.create_flow_run_from_deployment(deployment, parameters={"recipe": "good", "bogus": 1})
    resuming, asks = Scheduled(name="Resuming"), ["awaits:models:/good/1"]
    answered = client.create_flow_run_from_deployment(
        deployment, parameters=begins.parameters, state=resuming, tags=asks
    )
    absorb(client.read_flow_run(begins.id))
    states = [client.read_flow_run(run.id).state_name for run in (begins, waits, other, quick, answered)]
    assert states == ["Scheduled", "Skipped", "Scheduled", "Skipped", "Resuming"]
    assert [client.read_flow_run(run.id).state_name for run in (released, tonight)] == ["Skipped", "Scheduled"]
    assert "verdict:skipped" in client.read_flow_run(waits.id).tags
    planned = [run for run in client.read_flow_runs() if run.deployment_id == deployment and run.auto_scheduled]
    assert all(run.state_name == "Scheduled" and run.expected_start_time > datetime.now(UTC) for run in planned)


def test_of_the_runs_that_wait_behind_another_one_alone_stays(folder: Path, client: SyncPrefectClient) -> None:
    """A third one waited, and was skipped only when the second began."""
    (folder / "other.yaml").write_text(GOOD)
    Follower(print).deploy()
    deployment, elsewhere = (client.read_deployment_by_name(f"merge/{name}").id for name in ("good", "other"))

    def take(of: UUID, tags: Sequence[str] = (), **given: Any) -> UUID:
        """As a worker does, which finds the slot taken by the first."""
        recipe = "good" if of == deployment else "other"
        run = client.create_flow_run_from_deployment(of, parameters={"recipe": recipe, **given}, tags=tags).id
        client.set_flow_run_state(run, Pending())
        return run

    def states() -> list[str | None]:
        return [client.read_flow_run(run).state_name for run in (*goes_on, second, other, answered, *third)]

    goes_on, second = (take(deployment), take(elsewhere)), take(deployment)
    other, answered = take(deployment, overrides=["seed=1"]), take(deployment, ["awaits:models:/good/1"])
    third = take(deployment, overrides=[]), take(elsewhere)
    waits = "AwaitingConcurrencySlot"
    assert states() == ["Pending", "Pending", *[waits] * 5]
    absorb_waiting()
    assert states() == ["Pending", "Pending", waits, waits, waits, "Skipped", waits]
    assert "verdict:skipped" in client.read_flow_run(third[0]).tags
    absorb_waiting()  # the last one is there to stay
    assert states().count("Skipped") == 1
    for run in goes_on:
        client.set_flow_run_state(run, Cancelled(), force=True)


def test_what_cannot_be_deployed_is_told_once_and_tried_again(
    folder: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended `lewis up`."""
    said = list[str]()

    def away(**_: Any) -> Any:
        raise LewisError("the server is away")

    follower = Follower(said.append)
    with monkeypatch.context() as patch:
        patch.setattr(deploy, "get_client", away)
        for _ in range(3):
            follower.follow()
    problem = "the recipes could not be deployed; trying again: the server is away"
    assert said == [] and caplog.messages.count(problem) == 1
    follower.follow()
    follower.follow()
    (folder / "good.yaml").rename(folder / "better.yaml")
    follower.follow()
    (folder / "better.yaml").unlink()
    follower.follow()
    follower.follow()
    assert [line.rpartition(": ")[2] for line in said] == ["good", "better", "none"]


def test_a_recipe_has_its_deployment_before_the_poll_announces_its_release(
    folder: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was announced before started nothing, and was repeated two minutes later."""
    seen = list[str]()

    def poll_once() -> bool:
        seen.append(client.read_deployment_by_name("merge/good").name)
        return False

    monkeypatch.setattr(webhook.watch, "poll_once", poll_once)
    monkeypatch.setattr(recipes_page, "keep", lambda: None)
    webhook._poll(webhook._Look(Follower(print)))
    assert seen == ["good"]


@pytest.mark.parametrize("text", ["deployments: [merge]", "deployments: 5", "deployments: {name: x}"])
def test_a_file_without_a_list_of_deployments_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(InputError, match=r"prefect.yaml: deployments: expected a list of mappings, got "):
        deploy._content(tmp_path / "prefect.yaml")


def test_what_is_deployed_names_no_recipe() -> None:
    """`search` was deployed with the recipe `smollm2`, which a folder of the user's own has not."""
    content = yaml.safe_load(deploy.PREFECT_YAML.read_text())
    assert content["deployments"] and not [
        each for each in content["deployments"] if "recipe" in each.get("parameters", {})
    ]
    assert all(each["tags"] == [SERVICE_TAG] for each in content["deployments"])  # `lewis open` shows none of them
