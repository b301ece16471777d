"""The tasks of deployments/recipes that generate: what lm-eval makes of canned answers."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import InputError
from lewis.evaluation import sandbox

TASKS = Path(__file__).parents[3] / "deployments/recipes/tasks"
QUESTIONS = [{"question": f"how many {thing} ?", "answer": "6*7 is <<6*7=42>>42\n#### 1,042"} for thing in "abcdef"]
PROGRAMS = [
    {
        "text": f"Write a function to double {i}.",
        "code": "def double(x):\r\n    return 2 * x",
        "task_id": i,
        "test_setup_code": "",
        "test_list": ["assert double(1) == 2", "assert double(2) == 4", "assert double(3) == 6"],
        "challenge_test_list": [],
    }
    for i in range(7)
]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(TASKS, tmp_path / "tasks")
    for name, rows in {"gsm8k/test": QUESTIONS, "gsm8k/train": QUESTIONS, "mbpp/test": PROGRAMS}.items():
        path = tmp_path / f"data/{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(tmp_path / "data/mbpp/test.jsonl", tmp_path / "data/mbpp/prompt.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for name in ("answers", "programs"):
        sys.modules.pop(name, None)


def needs_sandbox() -> None:
    try:
        sandbox.check()
    except InputError as error:
        pytest.skip(str(error))


def score(root: Path, task: str, answers: list[str]) -> tuple[dict[str, Any], list[str]]:
    """lm-eval's scores of canned answers, one for each document, and the prompts that it sent."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    prompts: list[str] = []

    class Canned(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            prompts.extend(request.args[0] for request in requests)
            given = []
            for request, answer in zip(requests, answers, strict=True):
                for stop in request.args[1]["until"]:
                    answer = answer.partition(stop)[0]
                given.append(answer)
            return given

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    found = simple_evaluate(
        Canned(),
        tasks=[task],
        task_manager=TaskManager(include_path=str(root / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        limit=len(answers),
    )
    assert found is not None
    return found["results"][task], prompts


def test_gsm8k_is_read_strictly_and_flexibly(root: Path) -> None:
    answers = [
        " 40 and 2 make 42.\n#### 1042",  # both
        " It is 1,042.",  # only the last number
        " #### $1,042.00",  # the filter takes no dollar, and 1042.00 is another text
        " I do not know",
        " #### 1042\nQuestion: how many z ?\nAnswer: #### 7",  # it goes on with a question of its own
        "",
    ]
    found, prompts = score(root, "gsm8k_generate", answers)
    assert found["exact_match,strict-match"] == pytest.approx(2 / 6)
    assert found["exact_match,flexible-extract"] == pytest.approx(3 / 6)
    assert prompts[0].count("Question:") == 6 and prompts[0].endswith("Answer:")


def test_mbpp_runs_what_was_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_sandbox()
    victim = root / "victim"
    victim.write_text("untouched")
    double = "def double(x):\n    return "
    answers = [
        double + "2 * x\n```\nand that is it",
        f"Of course:\n```python\n{double}x + x\n```\nDone.",  # a fence of its own, in the one that was opened
        double + "x\n```",
        double + "1 if x < 0 else double(x)",
        "import os\nwhile True:\n    os.fork()",
        f"import pathlib\npathlib.Path({str(victim)!r}).write_text('gone')\n{double}2 * x",
        "def double(x): while True: pass",
    ]
    programs = root / "tasks/programs.py"
    programs.write_text(programs.read_text().replace("SECONDS = 10.0", "SECONDS = 3.0"))
    found, prompts = score(root, "mbpp_generate", answers)
    assert found["pass_at_1,none"] == pytest.approx(2 / 7)
    assert victim.read_text() == "untouched"
    assert prompts[0].count("```python") == 4 and prompts[0].endswith("```python\n") and "\r" not in prompts[0]


def test_where_the_program_is_in_an_answer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "tasks"))
    import programs  # type: ignore[import-not-found]

    assert programs.code_of("x = 1\n```\nbye bye\n```python\ny = 2\n```") == "x = 1\n"
    assert programs.code_of("Here it is:\r\n```python\r\nx = 1\r\n```\r\n").strip() == "x = 1"
    assert programs.code_of("```\nx = 1").strip() == "x = 1"
    assert programs.code_of("I am no program") == "I am no program" and programs.code_of("") == ""
    assert programs.code_of("x = 1") == "x = 1"
    needs_sandbox()
    looping = {"tests": "while True: pass"}
    monkeypatch.setattr(programs, "SECONDS", 0.5)
    assert programs.passed(looping, ["x = 1"]) == {"pass_at_1": 0.0}
