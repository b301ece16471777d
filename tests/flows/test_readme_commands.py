"""README's commands as a newcomer runs them: of the wheel, in an empty folder, line by line, on small local models."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import Family
from tests.flows.conftest import TASK, Command, write_words
from tests.flows.test_run import finished

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
LINES = re.findall(r"^ {4}lewis (.+?)(?: {2,}#.*)?$", README, re.MULTILINE)
ELSEWHERE = ("demo", "up", "rollback my-merge")  # test_demo, the tests of the service, test_champion
ROWS = {"question": "w1 w2", "answer": "w3 w4", "text": "w5 w6", "code": "w7 w8"}


@pytest.fixture
def program(installed: Path) -> Path:
    """The wheel's `lewis`, or another one to try the lines with."""
    return Path(os.environ.get("LEWIS_PROGRAM") or installed / "bin" / "lewis")


def write_recipe(folder: Path, family: Family) -> None:
    """README's recipe with other models, rows and tasks, in the place where README has it."""
    [text] = re.findall(r"^```yaml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    recipe = yaml.safe_load(text)
    recipe["base_model"] = str(family.base)
    for entry, expert in zip(recipe["models"], family.experts, strict=True):
        entry["model"] = str(expert)
    for rows in recipe["lewis"]["calibrations"].values():
        rows |= {"dataset": "json", "data_files": str(folder / "rows.jsonl"), "config": None}
    recipe["evaluate"] |= {"tasks": [str(folder / "words.yaml")]}
    recipe["register"]["gate"] |= {"metric": "words/acc,none", "tolerance": 1}  # random weights know nothing
    (folder / "rows.jsonl").write_text((json.dumps(ROWS) + "\n") * 64)
    (folder / "words.yaml").write_text(TASK)
    for place in (folder / "deployments" / "examples" / "qwen2.5.yaml", folder / "recipe.yaml"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(yaml.safe_dump(recipe))
        write_words(place.parent)  # a task's data are next to the recipe


@pytest.mark.long
@pytest.mark.timeout(900)
def test_its_lines_run_one_after_the_other(lewis: Command, program: Path, family: Family, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    write_recipe(folder, family)
    ran = []
    for number, line in enumerate([line for line in LINES if not line.startswith(ELSEWHERE)]):
        words = (
            line.replace("DIR", f"out{number}")
            .replace("my-merge/3", "my-merge/1")
            .replace("my-recipe", "recipe")
            .split()
        )
        words = [str(family.math) if word == "org/other" else word for word in words]
        code, out, err = finished(lewis(*words, program=program, folder=folder, PYTHONPATH=""), timeout=600)
        text = " ".join(out.split())  # cells of a table may be several lines
        down = words[0] == "status" and "is not running; `lewis up` starts it" in text  # as its exit code says
        assert code == 0 or down, f"lewis {line}\n{out}\n{err}"
        ran.append(words[0])
    assert ran[:2] == ["plan", "run"] and {"inspect", "merge", "pull", "status", "history", "compare"} <= {*ran}
    code, out, err = finished(
        lewis("new", family.base, *family.experts, "-o", "mine.yaml", program=program, folder=folder, PYTHONPATH="")
    )
    assert code == 0 and "scored by" in out, err
