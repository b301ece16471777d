"""What a task more costs, and a kill: scorings that run, and prompts that are asked for again.

    python -m tests.benchmarks.scores FAMILY

FAMILY: the folder of a demo (`LEWIS_HOME/demo`). Four of its models are scored on its three tasks, then on four. Then
one evaluation is killed (SIGKILL) at ten points, one after another, against a server that counts the prompts.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from tests.benchmarks.shared import heading, row
from tests.support.completions_server import serving
from tests.support.killed_evaluation import asked, killed_at

KILLS, BATCH = 10, 4


def main(arguments: Sequence[str]) -> int:
    """Print the figures; 1 if one is not what it should be."""
    family = Path(arguments[0]).absolute()
    with tempfile.TemporaryDirectory(prefix="lewis-benchmark-") as folder:
        os.environ["LEWIS_HOME"] = folder
        return 0 if all([_one_task_more(family), _kills(family, Path(folder))]) else 1


def _settings(family: Path):  # type: ignore[no-untyped-def]
    from lewis.evaluation.harness.lm_eval import EvalSettings

    tasks = yaml.safe_load((family / "demo.yaml").read_text())["evaluate"]["tasks"]
    return EvalSettings(tuple(tasks), family, batch_size=BATCH)


def _one_task_more(family: Path) -> bool:
    from lewis.evaluation.step import score
    from lewis.models.source import ModelFiles
    from lewis.store import kinds

    task = yaml.safe_load((family / "tasks/addition.yaml").read_text())
    more = Path(os.environ["LEWIS_HOME"]) / "more.yaml"
    more.write_text(yaml.safe_dump({**task, "task": "more", "num_fewshot": 1, "fewshot_split": "test"}))
    settings = _settings(family)
    folders = [family / "base", *sorted((family / "experts").iterdir())]
    models = [ModelFiles.at(folder.name, folder.name, folder) for folder in folders]
    heading("one task more: four models, three tasks, then four")
    before, ran = 0, list[int]()
    for tasks in (settings.tasks, (*settings.tasks, str(more))):
        begin = time.monotonic()
        for files in models:
            score(files, replace(settings, tasks=tasks))
        ran.append(len(kinds.SCORES.entries()) - before)
        before += ran[-1]
        row(
            f"{len(models)} models, {len(tasks)} tasks: scorings that ran",
            f"{ran[-1]}",
            f"{time.monotonic() - begin:.1f} s",
        )
    return ran == [12, 4]


def _kills(family: Path, folder: Path) -> bool:
    from lewis.errors import LewisError
    from lewis.evaluation.harness import lm_eval

    settings = replace(_settings(family), tasks=("tasks/addition.yaml",), backend="openai")
    with serving(family / "base") as (url, answers):
        os.environ["LEWIS_EVALUATION_SERVER"] = url
        whole = lm_eval.evaluate(family / "base", settings, answers=folder / "whole.jsonl")
        once, batches = asked(answers.asked), len((folder / "whole.jsonl").read_text().splitlines())
        answers.asked.clear()
        for number in range(KILLS):
            with killed_at(folder / "answers.jsonl", family, batches * (number + 1) // (KILLS + 1)):
                try:
                    lm_eval.evaluate(family / "base", settings, answers=folder / "answers.jsonl")
                except LewisError:
                    continue
        again = lm_eval.evaluate(family / "base", settings, answers=folder / "answers.jsonl")
        more = asked(answers.asked) - once
    heading(f"{KILLS} kills of one evaluation: {once} prompts, {batches} batches of at most {BATCH}")
    row("prompts asked for again, in all", str(more), f"at most {KILLS * BATCH}")
    row("scores and samples are the same bytes", str(again.content == whole.content))
    return more <= KILLS * BATCH and again.content == whole.content


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
