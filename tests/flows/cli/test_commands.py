"""The page of the commands names every command, every option and every key of what `--json` prints."""

import argparse
import dataclasses
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lewis.registry.history import Record
from lewis.serving.records import Served
from lewis.steps.plan import Plan
from lewis.store.verification import Verified
from lewis_flows.cli.main import COMMANDS, Command, _parser
from lewis_flows.merge import MergeReport
from lewis_flows.search import SearchReport
from lewis_flows.serve import ServeReport
from lewis_flows.service.cancel import Cancelled
from lewis_flows.service.links import Links, Pages
from lewis_flows.service.status_data import Status

PAGE = (Path(__file__).resolve().parents[3] / "deployments" / "COMMANDS.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
KEYS = {
    "run": set(MergeReport.model_fields),
    "search": set(SearchReport.model_fields),
    "serve": set(ServeReport.model_fields),
    "served": {each.name for each in dataclasses.fields(Served)},
    "status": set(Status.model_fields),
    "open": set(Links.model_fields) | set(Pages.model_fields),
    "cancel": set(Cancelled.model_fields),
    "plan": {each.name for each in dataclasses.fields(Plan)} | {"covered_layers"},
    "compare": {"a", "b", "rows", "only", "metric", "scores", "gain", "holm"},
    "history": {each.name for each in dataclasses.fields(Record)},
    "settings": {"settings", "unknown", "problems", "name", "value", "default", "what"},
    "verify": {each.name for each in dataclasses.fields(Verified)},
}


def options(command: Command) -> set[str]:
    parser = argparse.ArgumentParser()
    for add in command.arguments:
        add(parser)
    return {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_page_names_options_and_keys(command: Command) -> None:
    section, own = " ".join(SECTIONS[command.name].split()), options(command)
    assert "--json" in own or command.name == "up"
    assert [name for name in own - {"--json"} if name not in section] == []
    assert "JSON: " in section or command.name == "up"
    assert [key for key in KEYS.get(command.name, ()) if f"`{key}`" not in section.partition("JSON: ")[2]] == []


def test_the_page_names_no_command_that_there_is_not() -> None:
    assert list(SECTIONS) and set(SECTIONS) == {command.name for command in COMMANDS}


def test_a_shell_completes_commands_options_recipes_and_models(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_RECIPES", str(home / "recipes"))
    (home / "recipes").mkdir()
    (home / "recipes" / "alpha.yaml").touch()
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database:
        for name, version in (("one", 1), ("two", 2), ("two", 12)):
            row = (name, version, "None")
            database.execute("INSERT INTO model_versions (name, version, current_stage) VALUES (?, ?, ?)", row)
        database.commit()
    code = "from lewis_flows.cli.main import main; main()"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_POINT": "13", "COMP_TYPE": "9"}

    def completed(line: str) -> list[str]:
        reading, writing = os.pipe()
        environment = {**os.environ, **asked, "COMP_LINE": line, "COMP_POINT": str(len(line))}
        moved = f"import os; os.dup2({writing}, 8); {code}"
        subprocess.run([sys.executable, "-c", moved], env=environment, pass_fds=[writing], capture_output=True)
        os.close(writing)
        with os.fdopen(reading) as told:
            return [each.strip() for each in told.read().split("\n")]

    assert completed("lewis roll") == ["rollback"]
    assert {"--check", "--json"} <= set(completed("lewis status --"))
    assert completed("lewis status al") == completed("lewis cancel al") == ["alpha"]
    assert {"one", "two"} <= set(completed("lewis rollback "))
    assert completed("lewis approve two/") == ["two/12", "two/2"]
    assert _parser().prog == "lewis"
