"""Merge methods against each other: how far the merged model is from the experts, each on its own task.

    python -m tests.benchmarks.methods FILE.jsonl --shared DIR --base DIR [--full-math DIR --full-code DIR]
        [--families ...] [--methods ...] [--rows N] [--skip N] [--samples N] [--minutes N]
    python -m tests.benchmarks.methods FILE.jsonl --table

Families: `two` LoRA experts of one seed (maths, code), `seeds`: two of different seeds (code, SQL), `three` LoRA
experts, `full`: two full fine-tunes (`real/train_expert.py math` and `code`, without --lora). The distance is the mean
over the tasks of the loss, in nats per answer token and mean over the rows, minus that of the expert on its own task,
with the paired 95 % interval. Each case is one merge; its line is appended to the file, and it is not run again. Models
are scored in fp32.
"""

import argparse
import json
import re
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lewis import pipeline
from lewis.models.checkpoint import Checkpoint
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from tests.benchmarks.quality import MEMORY, Scorer, lines

END = "<|im_end|>"
SETS = {  # task -> calibration set, in the format of the training to the end token; samples of it relative to others
    "math": ({"data_files": "gsm8k/train.jsonl", "text": f"Question: {{question}}\nAnswer: {{answer}}{END}"}, 1),
    "code": ({"data_files": "mbpp/train.jsonl", "text": f"{{text}}\n{{test_list[0]}}\n{{code}}{END}"}, 1),
    "sql": ({"data_files": "sql/train.jsonl", "text": f"Question: {{question}}\nSQL: {{query}}{END}"}, 3),  # short rows
}
FAMILIES = {
    "two": ("math", "code"),
    "seeds": ("code", "sql"),
    "three": ("math", "code", "sql"),
    "full": ("math", "code"),
}
_LAMBDAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_PRUNED: dict[str, Any] = {"prune_by": "activation", "density": {"strategy": "uniform", "budget": 0.6}}
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {  # label -> method, parameters, lewis block
    **{f"task_arithmetic, lambda {x}": ("task_arithmetic", {"lambda": x}, None) for x in _LAMBDAS},
    "regmean": ("regmean", {}, {}),
    "regmean_forward": ("regmean_forward", {}, {}),
    "regmean_forward, ridge 1e-4": ("regmean_forward", {"ridge": 1e-4}, {}),
    "regmean_forward, ridge 1e-3": ("regmean_forward", {"ridge": 1e-3}, {}),
    "regmean_forward, ridge 1e-2": ("regmean_forward", {"ridge": 1e-2}, {}),
    "regmean_forward, residual 0": ("regmean_forward", {"residual": 0}, {}),
    **{f"ties 0.6 by activation, lambda {x}": ("ties", {"lambda": x}, _PRUNED) for x in (1.0, 1.3)},
    **{f"dare_ties 0.6, lambda {x}": ("dare_ties", {"density": 0.6, "lambda": x}, None) for x in (0.7, 1.0)},
    **{f"della 0.6, lambda {x}": ("della", {"density": 0.6, "lambda": x}, None) for x in (0.7, 1.0)},
    "ties 0.1 by activation": (
        "ties",
        {},
        {"prune_by": "activation", "density": {"strategy": "uniform", "budget": 0.1}},
    ),
    "base": ("linear", {}, None),
}


@dataclass(frozen=True)
class Case:
    """One model of a family, scored on `rows` rows of each task from `skip` on; `method` is a label or `experts`."""

    family: str
    method: str
    rows: int
    skip: int
    samples: int


def test_rows(data: Path, tasks: tuple[str, ...], rows: int, skip: int) -> dict[str, list[tuple[str, str]]]:
    """Task -> (prompt, answer), as the experts were trained."""
    found = {}
    for task in tasks:
        file = {"math": "gsm8k", "code": "mbpp", "sql": "sql"}[task]
        for row in lines(data / file / "test.jsonl")[skip : skip + rows]:
            if task == "code":
                pair = (f"{row['text']}\n{row['test_list'][0]}\n", row["code"].replace("\r", ""))
            elif task == "sql":
                pair = (f"Question: {row['question']}\nSQL:", " " + row["query"])
            else:
                pair = (f"Question: {row['question']}\nAnswer:", " " + re.sub(r"<<.*?>>", "", row["answer"]))
            found.setdefault(task, []).append(pair)
    return found


def recipe_of(case: Case, base: Path, experts: list[Path], data: Path) -> Recipe:
    method, parameters, lewis = METHODS[case.method]
    tasks = FAMILIES[case.family]
    content: dict[str, Any] = {"merge_method": method, "base_model": str(base), "parameters": parameters}
    content["models"] = [{"model": str(path)} for path in experts]
    if lewis is not None:
        sets = {}
        for task, entry in zip(tasks, content["models"], strict=True):
            spec, times = SETS[task]
            file = str(data / spec["data_files"])
            sets[task] = {
                **spec,
                "dataset": "json",
                "data_files": file,
                "samples": times * case.samples,
                "max_tokens": 192,
            }
            entry["calibration"] = task
        content["lewis"] = {"calibrations": sets, **lewis}
    return Recipe.parse(yaml.safe_dump({**content, "dtype": "bfloat16"}), root=data)


def run(case: Case, scorer: Scorer, base: Path, experts: list[Path], data: Path) -> dict[str, Any]:
    """Merge in memory and score; or score the experts, or the base."""
    if case.method in ("experts", "base"):
        plain = Recipe.parse(
            yaml.safe_dump(
                {
                    "merge_method": "task_arithmetic",
                    "base_model": str(base),
                    "models": [{"model": str(e)} for e in experts],
                }
            ),
            root=data,
        )
        pinned, sources = pipeline.pin_all(plain)
        assert pinned is not None
        if case.method == "base":
            return {"losses": scorer.losses(pipeline.download(pinned).open())}
        losses = {}
        for task, source in zip(FAMILIES[case.family], sources, strict=True):
            losses |= scorer.losses(pipeline.download(source).open(), task)
        return {"losses": losses}
    recipe = recipe_of(case, base, experts, data)
    pinned, sources = pipeline.pin_all(recipe)
    assert pinned is not None
    base_files: ModelFiles = pipeline.download(pinned)
    files = [pipeline.download(source) for source in sources]
    start = time.perf_counter()
    allocated = pipeline.guide(recipe, base_files, files)[1] if recipe.allocator else None
    merge = pipeline.prepare_merge(recipe, base_files, files, allocated)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        merge.run(Path(folder) / "merged", threads=torch.get_num_threads())
        seconds = time.perf_counter() - start
        losses = scorer.losses(Checkpoint(Path(folder) / "merged", merge.digest))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"losses": losses, "seconds": round(seconds, 1), "process_peak_gb": round(peak, 2)}


def distance(
    found: dict[str, list[float]], other: dict[str, list[float]], draws: int = 10_000
) -> tuple[float, float, float]:
    """Mean over the tasks of the mean difference of the rows, and its 95 % bootstrap interval."""
    rng, means = np.random.default_rng(0), np.zeros(draws)
    gaps = [np.array(found[task]) - np.array(other[task]) for task in found]
    for gap in gaps:
        means += gap[rng.integers(0, len(gap), (draws, len(gap)))].mean(axis=1) / len(gaps)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def print_tables(known: dict[Case, dict[str, Any]]) -> None:
    """For each family: loss of each task, distance to the experts, and to the best task arithmetic."""
    for kind in dict.fromkeys((case.family, case.rows, case.skip, case.samples) for case in known):
        mine = {
            case.method: found
            for case, found in known.items()
            if kind == (case.family, case.rows, case.skip, case.samples)
        }
        if "experts" not in mine:
            continue
        own = mine["experts"]["losses"]
        sums = [name for name in mine if name.startswith("task_arithmetic")]
        best = min(sums, key=lambda name: distance(mine[name]["losses"], own)[0]) if sums else None
        family, rows, skip, samples = kind
        print(f"\n**{family}**: test rows {skip + 1} to {skip + rows} of each task, {samples} calibration rows\n")
        print(f"| method | {' | '.join(own)} | from the experts | from the best task arithmetic | seconds |")
        print(f"| --- |{' --- |' * len(own)} --- | --- | --- |")
        for name in sorted(mine, key=lambda name: distance(mine[name]["losses"], own)[0]):
            losses = mine[name]["losses"]
            cells = [f"{np.mean(losses[task]):.4f}" for task in own]
            for other in (own, mine[best]["losses"] if best else None):
                same = other is None or losses is other
                cells.append("" if same else "{:+.4f} ({:+.4f} to {:+.4f})".format(*distance(losses, other)))
            print(f"| {name} | {' | '.join(cells)} | {mine[name].get('seconds', '')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--full-math", type=Path)
    parser.add_argument("--full-code", type=Path)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "base"])
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--skip", type=int, default=100, help="begin after these test rows")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows of each set")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after these")
    options = parser.parse_args()
    found = lines(options.results) if options.results.exists() else []
    known = {Case(**each.pop("case")): each for each in found}
    start = time.perf_counter()
    for family in [] if options.table else options.families:
        data, adapters = options.shared / "data", options.shared / "real"
        experts = [adapters / f"lora-{task}" for task in FAMILIES[family]]
        if family == "full":
            if not (options.full_math and options.full_code):
                continue
            experts = [options.full_math, options.full_code]
        cases = [
            Case(family, name, options.rows, options.skip, options.samples) for name in ("experts", *options.methods)
        ]
        if all(case in known for case in cases):
            continue
        rows = test_rows(data, FAMILIES[family], options.rows, options.skip)
        scorer = Scorer(options.base, rows, torch.float32)
        for case in cases:
            if case in known or time.perf_counter() - start > 60 * options.minutes:
                continue
            known[case] = run(case, scorer, options.base, experts, data)
            with options.results.open("a") as file:
                file.write(json.dumps({"case": vars(case), **known[case]}) + "\n")
            print(case, known[case].get("seconds"), flush=True)
    print_tables(known)


if __name__ == "__main__":
    main()
