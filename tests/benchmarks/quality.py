"""What guidance buys: answer loss of merges of two real families, against uniform magnitude pruning at the same budget.

    python -m tests.benchmarks.quality --shared DIR --base DIR [--full-math DIR --full-code DIR] [--rows N]
        [--samples N] [--grid core|some|all]

`DIR` of `--shared` holds `real/lora-math`, `real/lora-code` and `data/` as the project's shared folder does. The LoRA
family is always there; the other needs experts that were fully fine-tuned. `all` is the whole cross product; the
others are cut to what `grid` lists, since each case costs a merge and the answer loss of all rows.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis import pipeline
from lewis.checkpoint import Checkpoint
from lewis.recipe import Recipe

TOKENS = 224
LEWIS = {"strategy": "lewis"}
RANK = {"strategy": "lewis", "scale": "rank"}


@dataclass(frozen=True)
class Case:
    """One merge: method, allocator with its metric, pruning score, budget."""

    method: str
    density: tuple[tuple[str, Any], ...]
    metric: str
    prune_by: str
    budget: float

    @property
    def label(self) -> str:
        strategy = dict(self.density)["strategy"]
        scale = dict(self.density).get("scale")
        metric = f" of {self.metric}" if strategy == "lewis" else ""
        return f"{strategy}{f' ({scale})' if scale else ''}{metric}"


def case(method: str, density: dict[str, Any], prune_by: str, budget: float, metric: str = "norm_difference") -> Case:
    return Case(method, tuple(density.items()), metric, prune_by, budget)


def grid(which: str) -> Iterator[Case]:
    """The cases; the first of each (method, budget) is the one that the others are compared with."""
    if which == "core":
        for budget in (0.03, 0.1):
            yield case("ties", {"strategy": "uniform"}, "magnitude", budget)
            yield case("ties", {"strategy": "uniform"}, "activation", budget)
        return
    guided: list[tuple[dict[str, Any], str]] = [(LEWIS, "norm_difference"), (RANK, "norm_difference")]
    guided += [(RANK, "delta_norm"), (RANK, "outlier")]
    guided += [({"strategy": name}, "norm_difference") for name in ("owl", "dlp", "depth_gradient", "global")]
    uniform = {"strategy": "uniform"}
    if which == "all":
        for method in ("ties", "dare_ties", "della"):
            for budget in (0.03, 0.1, 0.3):
                for prune_by in ("magnitude", "activation") if method != "dare_ties" else ("magnitude",):
                    yield case(method, uniform, prune_by, budget)
                    yield from (case(method, density, prune_by, budget, metric) for density, metric in guided)
        return
    for budget in (0.03, 0.1, 0.3):
        yield case("ties", uniform, "magnitude", budget)
        yield case("ties", uniform, "activation", budget)
        if budget < 0.3:
            yield case("ties", LEWIS, "magnitude", budget)
            yield case("ties", RANK, "magnitude", budget, "delta_norm")
            yield case("ties", RANK, "activation", budget, "delta_norm")
            yield case("ties", {"strategy": "owl"}, "activation", budget)
            yield case("ties", {"strategy": "global"}, "activation", budget)
    yield case("dare_ties", uniform, "magnitude", 0.1)
    yield case("dare_ties", RANK, "magnitude", 0.1, "delta_norm")
    yield case("della", uniform, "magnitude", 0.1)
    yield case("della", uniform, "activation", 0.1)


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:  # not splitlines(): some questions hold U+2028
        return [json.loads(line) for line in file]


def test_rows(data: Path, rows: int) -> dict[str, list[tuple[str, str]]]:
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
    return {name: each[:rows] for name, each in short.items()}


def answer_losses(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """Nats per answer token of each row."""
    losses = []
    for prompt, answer in pairs:
        p, a = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([(p + a)[:TOKENS]])
        with torch.inference_mode():
            hidden = model.model(input_ids=ids).last_hidden_state[0, len(p) - 1 : -1]
            logits = model.lm_head(hidden)
        losses.append(float(torch.nn.functional.cross_entropy(logits.float(), ids[0, len(p) :])))
    return losses


def recipe_of(each: Case, base: Path, experts: list[Path], data: Path, samples: int) -> Recipe:
    b = each.budget
    density: dict[str, Any] = {**dict(each.density), "min": round(b / 10, 6), "max": min(1.0, 4 * b), "budget": b}
    sets = {
        "gsm8k": {"data_files": str(data / "gsm8k" / "train.jsonl"), "text": "Question: {question}\nAnswer: {answer}"},
        "mbpp": {"data_files": str(data / "mbpp" / "train.jsonl"), "text": "{text}\n{test_list[0]}\n{code}"},
    }
    lewis: dict[str, Any] = {
        "calibrations": {name: {"dataset": "json", "samples": samples, **spec} for name, spec in sets.items()},
        "prune_by": each.prune_by,
        "density": density,
    }
    if dict(each.density)["strategy"] == "lewis":
        lewis["importance"] = {"metric": each.metric}
    models = [{"model": str(path), "calibration": name} for path, name in zip(experts, sets, strict=True)]
    parameters = {"epsilon": b / 20} if each.method == "della" else {}
    content = {"merge_method": each.method, "base_model": str(base), "models": models, "parameters": parameters}
    return Recipe.parse(yaml.safe_dump(content | {"lewis": lewis, "dtype": "bfloat16"}), root=data)


def interval(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (draws, len(differences)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def study(family: str, base: Path, experts: list[Path], options: argparse.Namespace) -> None:
    tokenizer, data = AutoTokenizer.from_pretrained(base), options.shared / "data"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    parameters, rows = dict(model.named_parameters()), test_rows(data, options.rows)
    references: dict[tuple[str, float], np.ndarray] = {}
    print(f"\n### {family}: {options.rows} test rows of each task, {options.samples} calibration rows\n")
    print("| method | budget | allocator | pruned by | gsm8k | mbpp | against uniform magnitude (95 % interval) |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for each in grid(options.grid):
        recipe = recipe_of(each, base, experts, data, options.samples)
        pinned, sources = pipeline.pin_all(recipe)
        assert pinned is not None
        files = [pipeline.download(source) for source in sources]
        _, allocated = pipeline.guide(recipe, pipeline.download(pinned), files)
        merge = pipeline.prepare_merge(recipe, pipeline.download(pinned), files, allocated)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            merge.run(Path(folder) / "merged")
            merged = Checkpoint(Path(folder) / "merged", merge.digest)
            for name in merge.layout:
                parameters[name].copy_(merged.read(name))
        losses = {task: np.array(answer_losses(model, tokenizer, pairs)) for task, pairs in rows.items()}
        together = np.concatenate(list(losses.values()))
        reference = references.setdefault((each.method, each.budget), together)
        low, high = interval(together - reference)
        gap = (
            "reference"
            if reference is together
            else f"{(together - reference).mean():+.4f} ({low:+.4f} to {high:+.4f})"
        )
        cells = [
            each.method,
            f"{each.budget:g}",
            each.label,
            each.prune_by,
            *(f"{x.mean():.4f}" for x in losses.values()),
            gap,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--full-math", type=Path)
    parser.add_argument("--full-code", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64, help="calibration rows of each set")
    parser.add_argument("--grid", choices=["core", "some", "all"], default="some", help="all: the cross product, hours")
    options = parser.parse_args()
    start = time.perf_counter()
    families = {"LoRA": [options.shared / "real" / name for name in ("lora-math", "lora-code")]}
    if options.full_math and options.full_code:
        families["fully fine-tuned"] = [options.full_math, options.full_code]
    for family, experts in families.items():
        study(family, options.base, experts, options)
    print(f"\n{(time.perf_counter() - start) / 60:.0f} minutes, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
