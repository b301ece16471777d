"""What the prior, token weights and held-back rows give a fit in forward order: the distance from the experts.

    python -m tests.benchmarks.remedies rows DIR --shared DIR
    python -m tests.benchmarks.remedies run FILE.jsonl NAME --rows DIR --base DIR --expert TASK=DIR ... [--set K=V]
    python -m tests.benchmarks.remedies table FILE.jsonl

`rows` writes `TASK-train.jsonl` and `TASK-test.jsonl`, rows of `prompt` and `answer`, for the tasks math, code and sql
of `data/` in the shared folder. Other tasks need such files too. Those of the results whose rows are short are numbers
in words ("Number: 72\\nWords:", " seventy-two") and dates in five languages ("Date: 1974-02-09\\nIn Dutch:", " zaterdag
9 februari 1974"), 3,000 drawn rows to train on and others to test. Their experts were trained like those of the shared
folder (LoRA of rank 16, alpha 32, all linear layers, 140 steps of 4 rows, lr 4e-4, seeds 5 and 7), in fp32.

`run` merges once and scores the test rows from `--skip` on. `--set` overrides a key of the recipe, as `lewis merge`
does; the recipe is the recommended one, with `prompt` and `answer` and 64 calibration rows of each task. The distance
is the mean over the tasks of the loss, in nats per answer token and mean over the rows, minus that of the expert on
its own task, with the 95 % bootstrap interval over all rows; beside it that of each task, and of its worst row.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lewis.models.checkpoint import Checkpoint
from lewis.recipe.recipe import Recipe
from tests.benchmarks.quality import MEMORY, TOKENS, Scorer, interval, lines
from tests.support import pipeline

Pair = tuple[str, str]


def shared_rows(task: str, data: Path, part: str) -> list[Pair]:
    """The rows of a task of the shared folder, as its expert was trained."""
    if task == "code":
        files = ("validation", "train") if part == "train" else ("test",)
        found = [row for name in files for row in lines(data / "mbpp" / f"{name}.jsonl")]
        return [(f"{r['text']}\n{r['test_list'][0]}\n", r["code"].replace("\r", "")) for r in found]
    if task == "math":
        found = lines(data / "gsm8k" / f"{part}.jsonl")
        return [(f"Question: {r['question']}\nAnswer:", " " + re.sub(r"<<.*?>>", "", r["answer"])) for r in found]
    return [(f"Question: {r['question']}\nSQL:", " " + r["query"]) for r in lines(data / "sql" / f"{part}.jsonl")]


def write_rows(folder: Path, shared: Path) -> None:
    """Write the rows of all tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in ("math", "code", "sql"):
        for part in ("train", "test"):
            rows = [json.dumps({"prompt": p, "answer": a}) for p, a in shared_rows(task, shared / "data", part)]
            (folder / f"{task}-{part}.jsonl").write_text("\n".join(rows))


def recipe_of(options: argparse.Namespace, experts: dict[str, str], overrides: list[str]) -> Recipe:
    sets = {
        task: {
            "dataset": "json", "data_files": str(options.rows / f"{task}-train.jsonl"), "samples": 64,
            "prompt": "{prompt}", "answer": "{answer}",
        }
        for task in experts
    }  # fmt: skip
    content: dict[str, Any] = {
        "merge_method": "recommended",
        "base_model": str(options.base.resolve()),
        "models": [{"model": str(Path(path).resolve()), "calibration": task} for task, path in experts.items()],
        "dtype": "float32",
        "lewis": {"calibrations": sets},
    }
    return Recipe.parse(yaml.safe_dump(content), root=options.rows.resolve(), overrides=overrides)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Merge, and score the merged model and the experts."""
    experts = dict(each.split("=", 1) for each in options.expert)
    rows = {}
    for task in experts:
        found = [(row["prompt"], row["answer"]) for row in lines(options.rows / f"{task}-test.jsonl")]
        fitting = [pair for pair in found if len("".join(pair)) < 3 * TOKENS]
        rows[task] = fitting[options.skip : options.skip + options.count]
    scorer = Scorer(options.base, rows, torch.float32)
    recipe = recipe_of(options, experts, options.set or [])
    base, sources = pipeline.pin_all(recipe)
    assert base is not None
    files = [pipeline.download(source) for source in sources]
    begun = time.perf_counter()
    merge = pipeline.prepare_merge(recipe, pipeline.download(base), files)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        written = merge.run(Path(folder) / "merged")
        seconds = time.perf_counter() - begun
        merged = scorer.losses(Checkpoint(Path(folder) / "merged", merge.digest))
    own = {task: scorer.losses(model.open(), task)[task] for task, model in zip(experts, files, strict=True)}
    gaps = {task: [a - b for a, b in zip(merged[task], own[task], strict=True)] for task in experts}
    return {"name": options.name, "skip": options.skip, "gaps": gaps, "fit": written.fit, "seconds": round(seconds)}


def print_table(found: list[dict[str, Any]]) -> None:
    """A row for each run."""
    print("| merge | rows | from the experts | by task | worst row | s |\n| --- | --- | --- | --- | --- | --- |")
    for each in found:
        gaps = {task: np.array(gap) for task, gap in each["gaps"].items()}
        low, high = interval(np.concatenate(list(gaps.values())))
        mean, worst = np.mean([gap.mean() for gap in gaps.values()]), max(gap.max() for gap in gaps.values())
        tasks = ", ".join(f"{task} {gap.mean():+.4f}" for task, gap in gaps.items())
        first, last = each["skip"] + 1, each["skip"] + max(map(len, gaps.values()))
        cells = f"{mean:+.4f} ({low:+.4f} to {high:+.4f}) | {tasks} | {worst:+.2f} | {each['seconds']}"
        print(f"| {each['name']} | {first} to {last} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows, one, table = (commands.add_parser(name) for name in ("rows", "run", "table"))
    rows.add_argument("folder", type=Path)
    rows.add_argument("--shared", type=Path, required=True)
    for each in (one, table):
        each.add_argument("file", type=Path)
    one.add_argument("name")
    one.add_argument("--rows", type=Path, required=True, help="what `rows` wrote")
    one.add_argument("--base", type=Path, required=True)
    one.add_argument("--expert", action="append", required=True, help="TASK=DIR")
    one.add_argument("--set", action="append", help="a key of the recipe, as of lewis merge")
    one.add_argument("--skip", type=int, default=100, help="test rows that are left out")
    one.add_argument("--count", type=int, default=100, help="test rows of each task")
    options = parser.parse_args()
    if options.command == "rows":
        write_rows(options.folder, options.shared)
    elif options.command == "run":
        with options.file.open("a") as file:
            file.write(json.dumps(run(options)) + "\n")
        print_table(lines(options.file)[-1:])
    else:
        print_table(lines(options.file))


if __name__ == "__main__":
    main()
