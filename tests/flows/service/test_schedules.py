"""The nightly schedules always are those of the recipes that can run."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lewis.errors import LewisError
from lewis_flows.service import deploy, schedules
from lewis_flows.service.deploy import Deployed

GOOD = "{merge_method: ties, base_model: org/base, models: [{model: org/math}]}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one recipe that can run."""
    path = tmp_path / "recipes"
    path.mkdir()
    (path / "good.yaml").write_text(GOOD)
    monkeypatch.setenv("LEWIS_RECIPES", str(path))
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    return path


def test_whatever_happens_to_a_recipe_counts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = schedules.Folder()
    other, local = folder / "other.yaml", folder / "local.yaml"
    assert seen.runnable() == ["good"]
    other.write_text("models: [")  # broken when it is first seen
    assert seen.runnable() == ["good"]
    other.write_text(GOOD)  # mended
    assert seen.runnable() == ["good", "other"]
    other.write_text("models: [")  # broken
    assert seen.runnable() == ["good"]
    other.write_text(GOOD)
    other.rename(folder / "renamed.yaml")
    assert seen.runnable() == ["good", "renamed"]
    (folder / "renamed.yaml").unlink()
    local.write_text(GOOD.replace("org/math", "./model"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert seen.runnable() == seen.runnable() == ["good"]
    assert len(caplog.messages) == 1 and "local has no nightly schedule: ./model" in caplog.text
    (folder / "model").mkdir()  # no file of the folder's top has changed
    assert seen.runnable() == ["good", "local"]


def test_what_cannot_be_deployed_is_told_once_and_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended `lewis up`."""
    told, deployed = list[str](), list[list[str]]()

    def refuse(*_: Any) -> list[str]:
        raise LewisError("the server is away")

    service = Deployed(told.append)
    monkeypatch.setattr(deploy, "deploy", refuse)
    for _ in range(3):
        service.follow()
    assert told == ["the recipes could not be deployed; trying again: the server is away"]
    monkeypatch.setattr(deploy, "deploy", lambda file, recipes: deployed.append(recipes))
    service.follow()
    service.follow()
    (folder / "good.yaml").rename(folder / "better.yaml")
    service.follow()
    assert deployed == [["good"], ["better"]]


class Server:
    """Has one deployment, with schedules; stands for a client of Prefect's server."""

    def __init__(self, *schedules: tuple[str | None, str]) -> None:
        found = [
            SimpleNamespace(id=n, slug=each[0], parameters={"recipe": each[1]}) for n, each in enumerate(schedules)
        ]
        self.deployed = SimpleNamespace(id="deployed", schedules=found)

    def read_deployment_by_name(self, name: str) -> Any:
        assert name == "merge/merge-nightly"
        return self.deployed

    def delete_deployment_schedule(self, deployment: str, schedule: int) -> None:
        self.deployed.schedules = [each for each in self.deployed.schedules if each.id != schedule]

    def left(self) -> list[str | None]:
        return [each.slug for each in self.deployed.schedules]


def test_the_server_keeps_no_schedule_of_a_recipe_that_is_gone(folder: Path) -> None:
    (folder / "broken.yaml").write_text("models: [")
    ours = (("good", "good"), ("gone", "gone"), ("broken", "broken"))
    server: Any = Server(*ours, ("noon", "good"), ("weekly", "broken"), ("daily", "gone"), (None, "gone"))
    content: dict[str, Any] = {"deployments": [{"name": schedules.NIGHTLY}]}
    recipes = schedules.Folder().runnable()
    schedules.add_schedules(content, recipes)
    schedules.remove_stale(server, content, recipes)
    assert server.left() == ["good", "noon", "weekly"]

    # In `prefect.yaml` its schedule has another name now, and there must not be two.
    written = {"slug": "good-at-four", "cron": "0 4 * * *", "parameters": {"recipe": "good"}}
    content = {"deployments": [{"name": schedules.NIGHTLY, "schedules": [written]}]}
    schedules.add_schedules(content, recipes)
    assert content["deployments"][0]["schedules"] == [written]
    schedules.remove_stale(server, content, recipes)
    assert server.left() == ["noon", "weekly"]


def test_a_night_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tzlocal.get_localzone_name", lambda: "Asia/Kolkata")
    content = yaml.safe_load(deploy.PREFECT_YAML.read_text())
    mine = {"cron": "0 4 * * *", "timezone": "Europe/Oslo"}
    content["deployments"].append({"name": "mine", "schedules": [mine, {"interval": 60}]})
    schedules.add_schedules(content, ["good"])
    deploy.put_time_zone(content)
    found = [schedule for each in content["deployments"] for schedule in each.get("schedules", [])]
    zones = [each["timezone"] for each in found if "cron" in each]
    assert zones == ["Asia/Kolkata"] * 3 + ["Europe/Oslo"] and found[-1] == {"interval": 60}


def test_what_is_deployed_names_no_recipe_but_in_schedules() -> None:
    """A recipe of the project is none of the user's folder."""
    content = yaml.safe_load(deploy.PREFECT_YAML.read_text())
    assert [each["name"] for each in content["deployments"] if "recipe" in each.get("parameters", {})] == []
    schedules.add_schedules(content, [])
    assert [each["schedules"] for each in content["deployments"] if each["name"] == schedules.NIGHTLY] == [[]]
