"""What guidance buys: answer loss of merges of two real families, against uniform magnitude pruning at the same budget.

    python -m tests.benchmarks.quality FILE.jsonl --shared DIR --base DIR [--full-math DIR --full-code DIR]
        [--grid core|all|confirm] [--rows N] [--skip N] [--samples N] [--minutes N]
    python -m tests.benchmarks.quality FILE.jsonl --table [--against activation]

`DIR` of `--shared` holds `real/lora-math`, `real/lora-code` and `data/` as the project's shared folder does. The LoRA
family is always there; the other needs experts that were fully fine-tuned. Each case is one merge and the loss of all
rows; its line is appended to the file when it is done, and a case whose line is there is not run again. `all` is the
whole cross product, most informative first; `core` its first part; `confirm` repeats what these suggest, to be run on
the rows after those that suggested it (`--skip`). The merged model, bf16 as stored, is also scored in bf16, which is
three times as fast here as fp32: it adds about 0.004 nats of noise a row, which the intervals hold.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis.models.checkpoint import Checkpoint
from lewis.models.model import Model
from lewis.recipe.recipe import Recipe
from tests.support import pipeline

TOKENS, PER_BATCH = 224, 700
MEMORY = Path("/dev/shm")  # what is written there is written to no disk
BUDGETS = (0.03, 0.1, 0.3)
ALLOCATORS: dict[str, tuple[dict[str, Any], str]] = {  # label -> density, metric
    "uniform": ({"strategy": "uniform"}, ""),
    "lewis": ({"strategy": "lewis"}, "norm_difference"),
    "lewis (rank)": ({"strategy": "lewis", "scale": "rank"}, "norm_difference"),
    "lewis (rank) of delta_norm": ({"strategy": "lewis", "scale": "rank"}, "delta_norm"),
    "owl": ({"strategy": "owl"}, ""),
    "dlp": ({"strategy": "dlp"}, ""),
    "depth_gradient": ({"strategy": "depth_gradient"}, ""),
    "global": ({"strategy": "global"}, ""),
    "lewis (rank) of outlier": ({"strategy": "lewis", "scale": "rank"}, "outlier"),
}


@dataclass(frozen=True)
class Case:
    """One merge of a family, scored on `rows` rows of each task from `skip` on, calibrated on `samples`."""

    family: str
    method: str
    allocator: str
    prune_by: str
    budget: float
    rows: int
    samples: int
    skip: int = 0


def grid(which: str, families: Iterable[str], rows: int, samples: int, skip: int) -> Iterator[Case]:
    """All cases, most informative first; a case can come twice."""
    other = "lewis (rank) of outlier"
    first = [name for name in ALLOCATORS if name != other]
    parts: list[tuple[str, tuple[float, ...], str, list[str]]] = [("ties", BUDGETS[:2], "activation", first)]
    if which == "confirm":
        parts = [("ties", BUDGETS[:2], "activation", ["uniform", "owl"])]
    if which == "all":
        few = ["uniform", "lewis", "lewis (rank) of delta_norm", "owl", "global"]
        parts += [
            ("ties", BUDGETS[2:], "activation", first),
            ("ties", BUDGETS[:1], "magnitude", first),
            ("dare_ties", BUDGETS[1:], "magnitude", few),
            ("della", BUDGETS[1:2], "activation", ["uniform", "owl"]),
            ("ties", BUDGETS[:2], "activation", [other]),
            ("ties", BUDGETS[1:], "magnitude", first),
            ("dare_ties", BUDGETS, "magnitude", list(ALLOCATORS)),
            ("ties", BUDGETS, "activation", [other]),
            ("ties", BUDGETS, "magnitude", [other]),
            ("della", BUDGETS, "activation", list(ALLOCATORS)),
            ("della", BUDGETS, "magnitude", list(ALLOCATORS)),
        ]
    for method, budgets, prune_by, allocators in parts:
        for budget in budgets:
            for family in families:
                yield Case(family, method, "uniform", "magnitude", budget, rows, samples, skip)  # the reference
                yield from (Case(family, method, name, prune_by, budget, rows, samples, skip) for name in allocators)


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:  # not splitlines(): some questions hold U+2028
        return [json.loads(line) for line in file]


def test_rows(data: Path, rows: int, skip: int) -> dict[str, list[tuple[str, str]]]:
    """Task -> (prompt, answer), as the experts were trained."""
    gsm = [
        (f"Question: {r['question']}\nAnswer:", " " + re.sub(r"<<.*?>>", "", r["answer"]))
        for r in lines(data / "gsm8k" / "test.jsonl")
    ]
    mbpp = [
        (f"{r['text']}\n{r['test_list'][0]}\n", r["code"].replace("\r", ""))
        for r in lines(data / "mbpp" / "test.jsonl")
    ]
    short = {
        name: [p for p in each if len(p[0] + p[1]) < 3 * TOKENS] for name, each in (("gsm8k", gsm), ("mbpp", mbpp))
    }
    return {name: each[skip : skip + rows] for name, each in short.items()}


class Scorer:
    """The test rows as token ids, and a model that takes the weights of one merge after another."""

    def __init__(self, base: Path, rows: dict[str, list[tuple[str, str]]], dtype: torch.dtype = torch.bfloat16) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        self._rows: list[tuple[str, list[int], int]] = []  # task, ids, length of the prompt
        for task, pairs in rows.items():
            for prompt, answer in pairs:
                p, a = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
                self._rows.append((task, (p + a)[:TOKENS], len(p)))

    def losses(self, model: Model, only: str | None = None) -> dict[str, list[float]]:
        """Task -> nats per answer token of each row; of one task only, if that is asked for."""
        return {task: [loss for loss, _ in rows] for task, rows in self.scores(model, only).items()}

    def scores(self, model: Model, only: str | None = None) -> dict[str, list[tuple[float, float]]]:
        """Task -> of each row nats per answer token, and the share of them that the model ranks first."""
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name in model.tensors:
                parameters[name].copy_(model.read(name))
        of_row: dict[int, tuple[float, float]] = {}
        wanted = [i for i, (task, *_) in enumerate(self._rows) if only in (None, task)]
        order = sorted(wanted, key=lambda i: -len(self._rows[i][1]))
        while order:
            size = max(1, PER_BATCH // len(self._rows[order[0]][1]))
            batch, order = order[:size], order[size:]
            of_row |= self._batch(batch)
        tasks: dict[str, list[tuple[float, float]]] = {}
        for i in wanted:
            tasks.setdefault(self._rows[i][0], []).append(of_row[i])
        return tasks

    def _batch(self, batch: list[int]) -> dict[int, tuple[float, float]]:
        ids = torch.zeros(len(batch), len(self._rows[batch[0]][1]), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(self._rows[i][1])] = torch.tensor(self._rows[i][1])
        found = {}
        with torch.inference_mode():
            hidden = self._model.model(input_ids=ids, use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                _, own, prompt = self._rows[i]
                logits = self._model.lm_head(hidden[row, prompt - 1 : len(own) - 1]).float()
                answer = torch.tensor(own[prompt:])
                loss = float(torch.nn.functional.cross_entropy(logits, answer))
                found[i] = round(loss, 6), round(float((logits.argmax(-1) == answer).float().mean()), 4)
        return found


def recipe_of(case: Case, base: Path, experts: list[Path], data: Path) -> Recipe:
    b, (density, metric) = case.budget, ALLOCATORS[case.allocator]
    epsilon = b / 20 if case.method == "della" else 0.0
    bounds = {"min": round(b / 10, 6), "max": round(min(1 - 2 * epsilon, 4 * b), 6), "budget": b}
    sets = {
        "gsm8k": {"data_files": str(data / "gsm8k" / "train.jsonl"), "text": "Question: {question}\nAnswer: {answer}"},
        "mbpp": {"data_files": str(data / "mbpp" / "train.jsonl"), "text": "{text}\n{test_list[0]}\n{code}"},
    }
    lewis: dict[str, Any] = {
        "calibrations": {name: {"dataset": "json", "samples": case.samples, **spec} for name, spec in sets.items()},
        "prune_by": case.prune_by,
        "density": {**density, **bounds},
        **({"importance": {"metric": metric}} if metric else {}),
    }
    models = [{"model": str(path), "calibration": name} for path, name in zip(experts, sets, strict=True)]
    parameters = {"epsilon": epsilon} if epsilon else {}
    content = {"merge_method": case.method, "base_model": str(base), "models": models, "parameters": parameters}
    return Recipe.parse(yaml.safe_dump(content | {"lewis": lewis, "dtype": "bfloat16"}), root=data)


def run(case: Case, scorer: Scorer, base: Path, experts: list[Path], data: Path) -> dict[str, Any]:
    """Merge in memory and score."""
    recipe, start = recipe_of(case, base, experts, data), time.perf_counter()
    pinned, sources = pipeline.pin_all(recipe)
    assert pinned is not None
    base_files, files = pipeline.download(pinned), [pipeline.download(source) for source in sources]
    allocated = pipeline.guide(recipe, base_files, files)[1]
    guided = time.perf_counter()
    merge = pipeline.prepare_merge(recipe, base_files, files, allocated)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        merge.run(Path(folder) / "merged", threads=torch.get_num_threads())
        merged = time.perf_counter()
        losses = scorer.losses(Checkpoint(Path(folder) / "merged", merge.digest))
    seconds = [round(b - a, 1) for a, b in ((start, guided), (guided, merged), (merged, time.perf_counter()))]
    return {"densities": list(allocated.means.values()), "losses": losses, "seconds": seconds}


def interval(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (draws, len(differences)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def print_tables(known: dict[Case, dict[str, Any]], against: str) -> None:
    """For each family and method: allocators and scores down, budgets across; bold where the interval excludes 0."""
    together = {case: np.concatenate(list(found["losses"].values())) for case, found in known.items()}
    for kind in dict.fromkeys((case.family, case.method, case.rows, case.skip) for case in known):
        mine = [case for case in known if (case.family, case.method, case.rows, case.skip) == kind]
        family, method, rows, skip = kind
        print(f"\n**{family}, {method}**: test rows {skip + 1} to {skip + rows} of each task\n")
        budgets = sorted({case.budget for case in mine})
        print(f"| allocator | pruned by | {' | '.join(f'{b:g}' for b in budgets)} |")
        print(f"| --- | --- |{' --- |' * len(budgets)}")
        for prune_by, allocator in dict.fromkeys((case.prune_by, case.allocator) for case in mine):
            cells = []
            for budget in budgets:
                own, reference = (
                    next((c for c in mine if (c.prune_by, c.allocator, c.budget) == (score, name, budget)), None)
                    for score, name in ((prune_by, allocator), (against, "uniform"))
                )
                if own is None or reference is None:
                    cells.append("not run")
                elif own is reference:
                    tasks = " and ".join(f"{np.mean(x):.4f}" for x in known[own]["losses"].values())
                    cells.append(f"{tasks}: reference")
                else:
                    gap = together[own] - together[reference]
                    low, high = interval(gap)
                    mark = "**" if low * high > 0 else ""
                    cells.append(f"{mark}{gap.mean():+.4f}{mark} ({low:+.4f} to {high:+.4f})")
            print(f"| {allocator} | {prune_by} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--against", choices=["magnitude", "activation"], default="magnitude")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--full-math", type=Path)
    parser.add_argument("--full-code", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0, help="begin after these test rows")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows of each set")
    parser.add_argument(
        "--grid", choices=["core", "all", "confirm"], default="core", help="all: the cross product, hours"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after these")
    options = parser.parse_args()
    found = lines(options.results) if options.results.exists() else []
    known = {Case(**each.pop("case")): each for each in found}
    if not options.table:
        families = {"LoRA": [options.shared / "real" / name for name in ("lora-math", "lora-code")]}
        if options.full_math and options.full_code:
            families["fully fine-tuned"] = [options.full_math, options.full_code]
        start, data = time.perf_counter(), options.shared / "data"
        scorer = Scorer(options.base, test_rows(data, options.rows, options.skip))
        for case in grid(options.grid, families, options.rows, options.samples, options.skip):
            if case in known or time.perf_counter() - start > 60 * options.minutes:
                continue
            known[case] = run(case, scorer, options.base, families[case.family], data)
            with options.results.open("a") as file:
                file.write(json.dumps({"case": vars(case), **known[case]}) + "\n")
            print(case, known[case]["seconds"], flush=True)
    print_tables(known, options.against)


if __name__ == "__main__":
    main()
