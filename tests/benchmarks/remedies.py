"""What the prior, token weights and held-back rows give a fit in forward order: the distance from the experts.

    python -m tests.benchmarks.remedies rows DIR --shared DIR
    python -m tests.benchmarks.remedies run FILE.jsonl NAME --rows DIR --base DIR --expert TASK=DIR ... [--set K=V]
    python -m tests.benchmarks.remedies others FILE.jsonl NAME --rows DIR --base DIR --expert TASK=DIR ...
    python -m tests.benchmarks.remedies table FILE.jsonl

`rows` writes `TASK-train.jsonl` and `TASK-test.jsonl`, rows of `prompt` and `answer`, for the tasks math, code and sql
of `data/` in the shared folder. Other tasks need such files too. Those of the results whose rows are short are numbers
in words ("Number: 72\\nWords:", " seventy-two") and dates in five languages ("Date: 1974-02-09\\nIn Dutch:", " zaterdag
9 februari 1974"), 3,000 drawn rows to train on and others to test. Their experts were trained like those of the shared
folder (LoRA of rank 16, alpha 32, all linear layers, 140 steps of 4 rows, lr 4e-4, seeds 5 and 7), in fp32.

`run` merges once and scores the test rows from `--skip` on. `--set` overrides a key of the recipe, as `lewis merge`
does; the recipe is the recommended one, with `prompt` and `answer` and 64 calibration rows of each task. The distance
is the mean over the tasks of the loss, in nats per answer token and mean over the rows, minus that of the expert on
its own task, with the 95 % bootstrap interval over all rows; next to it that of each task, and of its worst row.

`others` does so for every other method, or for `--methods`, at the values of `OTHERS` that are best on test rows 1 to
`--tune`.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lewis.methods import find
from lewis.models.checkpoint import Checkpoint
from lewis.recipe.recipe import Recipe
from tests.benchmarks.quality import MEMORY, TOKENS, Scorer, interval, lines
from tests.support import pipeline

Pair = tuple[str, str]
_SCALES = (1.0, 0.7, 0.5, 0.35, 0.25)
OTHERS: dict[str, list[dict[str, float]]] = {  # method -> the values that are tried
    "task_arithmetic": [{"lambda": scale} for scale in _SCALES],
    "ties": [{"density": share, "lambda": scale} for share in (0.6, 0.3, 0.1) for scale in (2.0, 1.4, *_SCALES[:3])],
    **{
        method: [{"density": 0.6, "lambda": scale} for scale in (1.4, *_SCALES, 0.17, 0.12)]
        for method in ("dare_ties", "della")
    },
    "dare_linear": [{"density": 0.6, "lambda": scale} for scale in _SCALES],
    "della_linear": [{"density": 0.6, "lambda": scale} for scale in _SCALES],
    "breadcrumbs": [{"density": 0.9, "lambda": scale} for scale in _SCALES],
    **{method: [{"lambda": scale} for scale in (1.4, *_SCALES)] for method in ("consensus", "pcb")},
    "regmean": [{"ridge": ridge} for ridge in (1e-3, 1e-2, 1e-1, 1.0)],
    **{method: [{}] for method in ("linear", "sce", "model_stock", "ram", "ramplus_tl", "multislerp", "karcher")},
}


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


def sets_of(options: argparse.Namespace, tasks: Iterable[str]) -> dict[str, dict[str, Any]]:
    marked = {"prompt": "{prompt}", "answer": "{answer}"}
    return {
        task: {
            "dataset": "json", "data_files": str(options.rows / f"{task}-train.jsonl"), "samples": options.samples,
            **({"text": "{prompt}{answer}<|im_end|>"} if options.text else marked),
        }
        for task in tasks
    }  # fmt: skip


def recipe_of(options: argparse.Namespace, experts: dict[str, str], overrides: list[str]) -> Recipe:
    content: dict[str, Any] = {
        "merge_method": "recommended",
        "base_model": str(options.base.resolve()),
        "models": [{"model": str(Path(path).resolve()), "calibration": task} for task, path in experts.items()],
        "dtype": "float32",
        "lewis": {"calibrations": sets_of(options, experts)},
    }
    return Recipe.parse(yaml.safe_dump(content), root=options.rows.resolve(), overrides=overrides)


def other_recipe(options: argparse.Namespace, experts: dict[str, str], method: str, values: dict[str, float]) -> Recipe:
    base = options.base.resolve()
    models = [{"model": str(Path(path).resolve())} for path in experts.values()]
    content: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": {**values}, "models": models}
    if not find(method).base_is_a_model:
        content["base_model"] = str(base)
    else:  # the base would take part in the mean of the experts
        adapted = [(Path(each["model"]) / "adapter_config.json").exists() for each in models]
        content["models"] = [
            {"model": f"{base}+{each['model']}" if put else each["model"]}
            for each, put in zip(models, adapted, strict=True)
        ]
        content["parameters"] |= {"weight": 1.0} if method == "linear" else {}
    if method == "regmean":
        content["lewis"] = {"calibrations": sets_of(options, experts)}
        content["models"] = [{**each, "calibration": task} for each, task in zip(models, experts, strict=True)]
    return Recipe.parse(yaml.safe_dump(content), root=options.rows.resolve())


def test_rows(options: argparse.Namespace, tasks: Iterable[str], skip: int, count: int) -> dict[str, list[Pair]]:
    rows = {}
    for task in tasks:
        found = [(row["prompt"], row["answer"]) for row in lines(options.rows / f"{task}-test.jsonl")]
        rows[task] = [pair for pair in found if len("".join(pair)) < 3 * TOKENS][skip : skip + count]
    return rows


def merge(recipe: Recipe, scorer: Scorer) -> dict[str, Any]:
    """Merge, and score the merged model."""
    files = pipeline.fetch(recipe)
    begun = time.perf_counter()
    prepared = pipeline.prepare_merge(recipe, *files)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        written = prepared.run(Path(folder) / "merged")
        seconds = round(time.perf_counter() - begun)
        losses = scorer.losses(Checkpoint(Path(folder) / "merged", prepared.digest))
    return {"losses": losses, "fit": written.fit, "seconds": seconds}


Losses = dict[str, list[float]]


def of_experts(experts: dict[str, str], recipe: Recipe, scorer: Scorer) -> Losses:
    """The loss of each expert on the rows of its task."""
    _, files = pipeline.fetch(recipe)
    return {task: scorer.losses(model.open(), task)[task] for task, model in zip(experts, files, strict=True)}


def line(name: str, options: argparse.Namespace, found: dict[str, Any], own: Losses) -> dict[str, Any]:
    gaps = {task: [a - b for a, b in zip(found["losses"][task], own[task], strict=True)] for task in own}
    return {"name": name, "skip": options.skip, "gaps": gaps, "fit": found["fit"], "seconds": found["seconds"]}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Merge with the recommended recipe."""
    experts = dict(each.split("=", 1) for each in options.expert)
    scorer = Scorer(options.base, test_rows(options, experts, options.skip, options.count), torch.float32)
    recipe = recipe_of(options, experts, options.set or [])
    yield line(options.name, options, merge(recipe, scorer), of_experts(experts, recipe, scorer))


def others(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Merge with each other method, at its best values."""
    experts = dict(each.split("=", 1) for each in options.expert)
    tuning = Scorer(options.base, test_rows(options, experts, 0, options.tune), torch.float32)
    judging = Scorer(options.base, test_rows(options, experts, options.skip, options.count), torch.float32)
    own = of_experts(experts, recipe_of(options, experts, []), judging)
    for method in options.methods:
        tried = OTHERS[method]
        recipes = [other_recipe(options, experts, method, values) for values in tried]
        losses = [merge(each, tuning)["losses"] if len(recipes) > 1 else {"": [0.0]} for each in recipes]
        means = [np.mean([np.mean(rows) for rows in each.values()]) for each in losses]
        best = int(np.argmin(means))
        label = ", ".join([options.name, method, *(f"{name} {value:g}" for name, value in tried[best].items())])
        yield line(label, options, merge(recipes[best], judging), own)


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """The models and rows."""
    parser.add_argument("--rows", type=Path, required=True, help="what `rows` wrote")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--expert", action="append", required=True, help="TASK=DIR")
    parser.add_argument("--skip", type=int, default=100, help="test rows that are left out")
    parser.add_argument("--count", type=int, default=100, help="test rows of each task")
    parser.add_argument("--samples", type=int, default=64, help="calibration rows of each task")
    parser.add_argument("--text", action="store_true", help="calibration rows as plain text: no answer is marked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows, one, all_others, table = (commands.add_parser(name) for name in ("rows", "run", "others", "table"))
    rows.add_argument("folder", type=Path)
    rows.add_argument("--shared", type=Path, required=True)
    for each in (one, all_others, table):
        each.add_argument("file", type=Path)
    for each in (one, all_others):
        each.add_argument("name")
        add_options(each)
    one.add_argument("--set", action="append", help="a key of the recipe, as of lewis merge")
    all_others.add_argument("--methods", nargs="+", choices=OTHERS, default=[*OTHERS])
    all_others.add_argument("--tune", type=int, default=20, help="test rows of each task that values are chosen on")
    options = parser.parse_args()
    if options.command == "rows":
        write_rows(options.folder, options.shared)
    elif options.command in ("run", "others"):
        for found in (run if options.command == "run" else others)(options):
            with options.file.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print_table([found])
    else:
        print_table(lines(options.file))


if __name__ == "__main__":
    main()
