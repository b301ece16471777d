"""`lewis` as a process on the tests' Prefect server, and a recipe of tiny models with a real lm-eval task."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SESSION_HOME, Family
from tests.support.lineage import hub_of, make_home
from tests.support.local_hub import LocalHub
from tests.support.models import WORDS
from tests.support.warm import WarmPython

REPO = Path(__file__).resolve().parents[2]
TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: words.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["w1", "w2", "w3"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
RECIPE = """
merge_method: ties
base_model: %(base)s
models:
  - {model: %(math)s, parameters: {weight: 1.0}}
  - {model: %(code)s, parameters: {weight: 1.0}}
lewis:
  calibrations: {words: {dataset: json, data_files: words.jsonl, text: "{question} {answer}", samples: 16}}
evaluate: {tasks: [words.yaml]}
register: {name: tiny, gate: {metric: "words/acc,none", tolerance: 1}}
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A flow in the tests' own process asks a busy server again at once, as a worker's does, but waits for none."""
    from lewis_tasks.support import patience

    monkeypatch.setattr(patience, "begin", lambda **_: None)
    with monkeypatch.context() as patch:
        patch.setattr(patience, "_AWAY", ())
        undo = patience._put(patience._Outage(None), events=False)
        yield
        undo()


def write_words(folder: Path, count: int = 40) -> None:
    """The data of the tests' calibration set and lm-eval task."""
    draw = random.Random(0)
    rows = [{"question": " ".join(draw.choices(WORDS, k=5)), "answer": draw.choice(WORDS)} for _ in range(count)]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store; a database that is there already spares each test the making of one."""
    return make_home(tmp_path / "home", empty_database, monkeypatch)


@pytest.fixture
def hub(home: Path, tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that has the family as `org/base`, `org/math` and `org/code`."""
    with hub_of(family, home, tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of recipes; each test gives its recipes names of their own, as they share a server."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    return tmp_path / "recipes"


@pytest.fixture
def recipe(tmp_path: Path, family: Family) -> Path:
    """A recipe next to its data and its lm-eval task."""
    write_words(tmp_path)
    (tmp_path / "words.yaml").write_text(TASK)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE % {"base": family.base, "math": family.math, "code": family.code})
    return path


@pytest.fixture
def scores_here(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations in this process, which spares the imports of another one, and in the folder of the recipe."""
    from lewis.evaluation.harness import child, process

    def evaluate(request: dict[str, Any], **_: Any) -> dict[str, Any]:
        return child.evaluate(**json.loads(json.dumps(request)))

    monkeypatch.setattr(process, "run", evaluate)
    monkeypatch.chdir(recipe.parent)


Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def lewis(home: Path, prefect_url: str, warm: WarmPython) -> Iterator[Command]:
    """Start `lewis ARGUMENTS` as a process of its own.

    `patch` is Python that runs before it; `program` the `lewis` of another environment; `folder` where to start it.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str | Path, patch: str = "", program: Path | None = None, folder: Path = REPO, **environment: str
    ) -> subprocess.Popen[str]:
        code = f"{patch}\nfrom lewis_flows.cli.main import program\nprogram()"
        words = list(map(str, arguments))
        environment = {
            **os.environ,
            "LEWIS_HOME": str(home),
            "PREFECT_API_URL": prefect_url,
            "TMPDIR": SESSION_HOME,  # where the device slot is: tests that run side by side do not share it
            **environment,
        }
        if program is None and warm.fits(environment):
            process: subprocess.Popen[str] = warm.run(code, words, folder=folder, environment=environment)
        else:
            python = program.with_name("python") if program else sys.executable
            process = subprocess.Popen(
                [*([program] if program and not patch else [python, "-c", code]), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the shell ignores it
                env=environment,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
