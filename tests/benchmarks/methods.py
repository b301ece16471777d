"""Merge methods against each other: how far the merged model is from the experts, each on its own task.

    python -m tests.benchmarks.methods FILE.jsonl tune        --shared DIR --base DIR [--full-math DIR --full-code DIR]
    python -m tests.benchmarks.methods FILE.jsonl judge       --shared DIR --base DIR ...
    python -m tests.benchmarks.methods FILE.jsonl more        --shared DIR --base DIR ... --rows 176 --only METHOD ...
    python -m tests.benchmarks.methods FILE.jsonl calibration --shared DIR --base DIR ...
    python -m tests.benchmarks.methods FILE.jsonl table
    python -m tests.benchmarks.methods FILE.jsonl picture --output FILE.png

`tune` tries the values in `SEARCHED` on test rows 1 to `--rows`, models scored in bf16. `judge` takes the best value of
each method there, by family, to rows from 201 on, which no value was chosen on, scored in fp32. `more` does so on rows
from 25 on, for the methods that `--only` names, scored in bf16. `calibration` does so for other numbers of calibration
rows, and for wrong ones, on rows from 241 on, scored in bf16.

Families: `two` LoRA experts of one seed (maths, code), `seeds`: two of different seeds (code, SQL), `three` LoRA
experts, `full`: two full fine-tunes (`real/train_expert.py math` and `code`, without --lora). The distance is the mean
over the tasks of the loss, in nats per answer token and mean over the rows, minus that of the expert on its own task,
with the paired 95 % interval. Each case is one merge; its line is appended to the file, and it is not run again.
"""

import argparse
import json
import multiprocessing
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lewis.methods import find
from lewis.models.checkpoint import Checkpoint
from lewis.recipe.recipe import Recipe
from tests.benchmarks.quality import MEMORY, Scorer, lines
from tests.support import pipeline

END = "<|im_end|>"
SETS = {  # task -> calibration set, in the format of the training to the end token; samples of it relative to others
    "math": ({"data_files": "gsm8k/train.jsonl", "text": f"Question: {{question}}\nAnswer: {{answer}}{END}"}, 1),
    "code": ({"data_files": "mbpp/train.jsonl", "text": f"{{text}}\n{{test_list[0]}}\n{{code}}{END}"}, 1),
    "sql": ({"data_files": "sql/train.jsonl", "text": f"Question: {{question}}\nSQL: {{query}}{END}"}, 3),  # short rows
}
OTHER_FORMAT = {"math": "{answer} {question}", "code": "{code}\n{text}", "sql": "{query} {question}"}
FAMILIES = {
    "two": ("math", "code"),
    "three": ("math", "code", "sql"),
    "full": ("math", "code"),
    "seeds": ("code", "sql"),
}
NAMED = {  # in the picture
    "regmean_forward",
    "regmean",
    "ties",
    "task_arithmetic",
    "della",
    "pcb",
    "linear",
    "model_stock",
    "dare_ties",
}
JUDGED_FROM = 200  # test rows; those before have chosen values, of this study or of those before it
FOR_MORE = 24  # as many rows as `tune` had
FOR_CALIBRATION = 240  # rows from here on are not those that the methods were compared on
SKIPPED = {"tune": 0, "judge": JUDGED_FROM, "more": FOR_MORE, "calibration": FOR_CALIBRATION}


@dataclass(frozen=True)
class Candidate:
    """A method with its values; `density` of an activation-pruned one goes through the `lewis` block."""

    method: str
    values: tuple[tuple[str, float], ...] = ()
    by_activation: float = 0.0

    @property
    def label(self) -> str:
        values = [f"{self.by_activation:g} by activation"] if self.by_activation else []
        return ", ".join([self.method, *values, *(f"{name} {value:g}" for name, value in self.values)])


def _searched() -> Iterator[Candidate]:
    for scale in (1.0, 0.8, 0.6, 1.2, 0.4):
        yield Candidate("task_arithmetic", (("lambda", scale),))
    for ridge in (1e-2, 1e-1, 1e-3):
        yield Candidate("regmean_forward", (("ridge", ridge),))
    for share, scale in ((0.6, 1.3), (0.6, 1.0), (0.3, 1.3)):
        yield Candidate("ties", (("lambda", scale),), share)
    for method in ("dare_ties", "della"):
        for scale in (0.7, 1.0, 0.5):
            yield Candidate(method, (("density", 0.6), ("lambda", scale)))
    for ridge in (1e-1, 1e-2, 1.0):
        yield Candidate("regmean", (("ridge", ridge),))
    for method in ("consensus", "pcb", "breadcrumbs", "dare_linear", "della_linear"):
        density = () if method in ("pcb", "consensus") else (("density", 0.9 if method == "breadcrumbs" else 0.6),)
        for scale in (1.0, 0.7):
            yield Candidate(method, (*density, ("lambda", scale)))
    for method in ("linear", "sce", "model_stock", "ram", "ramplus_tl", "multislerp", "karcher"):
        yield Candidate(method)


SEARCHED = {each.label: each for each in _searched()}  # those that merge one expert into the base have no place here


@dataclass(frozen=True)
class Case:
    """One model of a family, scored on `rows` rows of each task from `skip` on; `method` is a label, or who it is.

    `sets`: `own` calibration rows of each expert; `few`: alike, but of SQL no more rows than of others; those of the
    `next` expert; its own rows in another `format`; or what the `base` itself writes.
    """

    family: str
    method: str
    rows: int
    skip: int
    samples: int = 32
    sets: str = "own"


def test_rows(data: Path, rows: int, skip: int) -> dict[str, list[tuple[str, str]]]:
    """Task -> (prompt, answer), as the experts were trained."""
    found: dict[str, list[tuple[str, str]]] = {}
    for task, file in (("math", "gsm8k"), ("code", "mbpp"), ("sql", "sql")):
        for row in lines(data / file / "test.jsonl")[skip : skip + rows]:
            if task == "code":
                pair = (f"{row['text']}\n{row['test_list'][0]}\n", row["code"].replace("\r", ""))
            elif task == "sql":
                pair = (f"Question: {row['question']}\nSQL:", " " + row["query"])
            else:
                pair = (f"Question: {row['question']}\nAnswer:", " " + re.sub(r"<<.*?>>", "", row["answer"]))
            found.setdefault(task, []).append(pair)
    return found


def written_by(base: Path, file: Path, rows: int) -> Path:
    """A file with `rows` texts that the base writes, sampled from its end token on; made once."""
    if not file.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
        start = torch.full((rows, 1), tokenizer.bos_token_id)
        ids = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=128)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        file.write_text("".join(json.dumps({"text": text or " "}) + "\n" for text in texts))
    return file


def calibrations(case: Case, base: Path, data: Path, made: Path) -> list[dict[str, Any]]:
    """The calibration set of each expert."""
    tasks, found = FAMILIES[case.family], []
    for i, own in enumerate(tasks):
        task = tasks[(i + 1) % len(tasks)] if case.sets == "next" else own
        spec, times = SETS[task]
        spec = {**spec, "data_files": str(data / spec["data_files"])}
        if case.sets == "format":
            spec["text"] = OTHER_FORMAT[task]
        elif case.sets == "few":
            times = 1
        elif case.sets == "base":
            spec = {"data_files": str(written_by(base, made, case.samples)), "text": "{text}"}
            times = 1
        found.append({**spec, "dataset": "json", "samples": times * case.samples, "max_tokens": 192})
    return found


def recipe_of(case: Case, base: Path, experts: list[Path], data: Path, made: Path) -> Recipe:
    """The recipe of a case; of `experts` and `base` any that names the models."""
    chosen = SEARCHED.get(case.method, Candidate("task_arithmetic"))
    content: dict[str, Any] = {"merge_method": chosen.method, "base_model": str(base), "dtype": "bfloat16"}
    content["parameters"] = dict(chosen.values)
    content["models"] = [{"model": str(path)} for path in experts]
    if find(chosen.method).base_is_a_model:  # it would take part in the mean of the experts
        del content["base_model"]
        adapted = [path for path in experts if (path / "adapter_config.json").exists()]
        content["models"] = [{"model": f"{base}+{path}" if path in adapted else str(path)} for path in experts]
        if chosen.method == "linear":
            content["parameters"]["weight"] = 1.0
    if chosen.by_activation or chosen.method.startswith("regmean"):
        sets = dict(zip(FAMILIES[case.family], calibrations(case, base, data, made), strict=True))
        for task, entry in zip(sets, content["models"], strict=True):
            entry["calibration"] = task
        content["lewis"] = {"calibrations": sets}
    if chosen.by_activation:
        content["lewis"] |= {
            "prune_by": "activation",
            "density": {"strategy": "uniform", "budget": chosen.by_activation},
        }
    return Recipe.parse(yaml.safe_dump(content), root=data)


def merge(recipe: Recipe, folder: Path, threads: int) -> tuple[str, float, float]:
    """Merge into a folder: the digest, seconds and the process's peak memory in GB."""
    torch.set_num_threads(threads)
    pinned, sources = pipeline.pin_all(recipe)
    base, files = pinned and pipeline.download(pinned), [pipeline.download(source) for source in sources]
    start = time.perf_counter()
    allocated = pipeline.guide(recipe, base, files)[1] if base and recipe.allocator else None
    prepared = pipeline.prepare_merge(recipe, base, files, allocated)
    prepared.run(folder, threads=threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return prepared.digest, round(time.perf_counter() - start, 1), round(peak, 2)


def run(case: Case, scorer: Scorer, recipe: Recipe, *, apart: bool) -> dict[str, Any]:
    """Merge in memory, `apart`: in a process of its own, and score; or score the experts, or the base."""
    tasks, scored = FAMILIES[case.family], {}
    if case.method in ("experts", "base"):
        pinned, sources = pipeline.pin_all(recipe)
        assert pinned is not None
        for task, source in zip(tasks, sources, strict=True):
            of = source if case.method == "experts" else pinned
            scored |= scorer.scores(pipeline.download(of).open(), task)
        cost = {}
    else:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            given = recipe, Path(folder) / "merged", torch.get_num_threads()
            if apart:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                    digest, seconds, peak = child.submit(merge, *given).result()
            else:
                digest, seconds, peak = merge(*given)
            cost = {"seconds": seconds, **({"peak_gb": peak} if apart else {})}
            merged = Checkpoint(Path(folder) / "merged", digest)
            for task in tasks:
                scored |= scorer.scores(merged, task)
    losses = {task: [loss for loss, _ in rows] for task, rows in scored.items()}
    top1 = {task: round(float(np.mean([hit for _, hit in rows])), 4) for task, rows in scored.items()}
    return {"losses": losses, "top1": top1, **cost}


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


Known = dict[Case, dict[str, Any]]


def best(known: Known, family: str) -> dict[str, str]:
    """Method -> its label with the least loss on the rows that values are chosen on, or its first if none was tried."""
    found: dict[str, tuple[float, str]] = {}
    for label, each in SEARCHED.items():
        found.setdefault(each.method, (float("inf"), label))
    for case, result in known.items():
        if case.family == family and case.skip == 0 and case.method in SEARCHED:
            loss = float(np.mean([np.mean(rows) for rows in result["losses"].values()]))
            method = SEARCHED[case.method].method
            found[method] = min(found.get(method, (loss, case.method)), (loss, case.method))
    return {method: label for method, (_, label) in found.items()}


def cases(options: argparse.Namespace, known: Known) -> Iterator[Case]:
    """What is to be run, the most telling first."""
    families = [name for name in options.families if name != "full" or (options.full_math and options.full_code)]
    if options.what == "tune":
        yield from (Case(family, label, options.rows, 0) for label in SEARCHED for family in families)
        return
    skip = SKIPPED[options.what]
    yield from (Case(family, "experts", options.rows, skip) for family in families)
    if options.what in ("judge", "more"):
        chosen = {family: best(known, family) for family in families}
        order = dict.fromkeys(each.method for each in SEARCHED.values())
        for method in options.only or order:
            for family in families:
                yield Case(family, chosen[family][method], options.rows, skip)
        yield from (Case(family, "base", options.rows, skip) for family in families if not options.only)
        return
    forward = Candidate("regmean_forward", (("ridge", 0.01),)).label
    for samples, sets in (
        (8, "own"),
        (8, "next"),
        (8, "base"),
        (8, "format"),
        (4, "own"),
        (32, "own"),
        (128, "own"),
    ):
        for family in families:
            yield Case(family, forward, options.rows, FOR_CALIBRATION, samples, sets)


def needs(label: str) -> str:
    """What a method needs to know of the experts in addition to their weights."""
    chosen = SEARCHED.get(label)
    if chosen is None or not (chosen.by_activation or chosen.method.startswith("regmean")):
        return ""
    return "second moments" if chosen.by_activation else "calibration rows"


def print_tables(known: Known) -> None:
    """For each family: loss of each task, distance to the experts, and to the best task arithmetic."""
    for kind in dict.fromkeys((case.family, case.rows, case.skip) for case in known if case.skip):
        mine = {case: found for case, found in known.items() if kind == (case.family, case.rows, case.skip)}
        by_label = {case.method: found for case, found in mine.items() if (case.samples, case.sets) == (32, "own")}
        if "experts" not in by_label:
            continue
        own = by_label["experts"]["losses"]
        sums = [name for name in by_label if name.startswith("task_arithmetic")]
        against = by_label[min(sums, key=lambda name: distance(by_label[name]["losses"], own)[0])] if sums else None
        family, rows, skip = kind
        print(f"\n**{family}**: test rows {skip + 1} to {skip + rows} of each task\n")
        print(
            "| method | loss: "
            + ", ".join(own)
            + " | top-1 | from the experts | from task arithmetic | s | GB | needs |"
        )
        print("| --- " * 8 + "|")
        for case in sorted(mine, key=lambda case: distance(mine[case]["losses"], own)[0]):
            found, label = mine[case], case.method
            if (case.samples, case.sets) != (32, "own"):
                label += f"; {case.samples} rows" + ("" if case.sets == "own" else f", {case.sets}")
            gaps = []
            for other in (own, against["losses"] if against else None):
                same = other is None or found["losses"] is other
                gaps.append("" if same else "{:+.4f} ({:+.4f} to {:+.4f})".format(*distance(found["losses"], other)))
            losses = ", ".join(f"{np.mean(found['losses'][task]):.4f}" for task in own)
            top1 = ", ".join(f"{100 * found['top1'][task]:.1f}" for task in own)
            cost = f"{found.get('seconds', '')} | {found.get('peak_gb', '')} | {needs(case.method)}"
            print(f"| {label} | {losses} | {top1} | {' | '.join(gaps)} | {cost} |")


def draw(known: Known, path: Path) -> None:
    """A picture: the distance to the experts against the seconds of a merge, a panel for each family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    judged = {case: found for case, found in known.items() if case.skip == JUDGED_FROM and case.samples == 32}
    families = [name for name in FAMILIES if any(case.family == name for case in judged)]
    figure, panels = pyplot.subplots(1, len(families), figsize=(4.2 * len(families), 4.2), squeeze=False)
    for panel, family in zip(panels[0], families, strict=True):
        mine = {case.method: found for case, found in judged.items() if case.family == family}
        own = mine["experts"]["losses"]
        for label, found in mine.items():
            if "seconds" in found:
                gap, low, high = distance(found["losses"], own)
                name, fits = SEARCHED[label].method, label.startswith("regmean")
                panel.errorbar(
                    max(found["seconds"], 0.1), gap, [[gap - low], [high - gap]], fmt="o", color="C1" if fits else "C0"
                )
                side = {"xytext": (-5, 5), "ha": "right"} if fits else {"xytext": (5, -3), "ha": "left"}
                if name in NAMED:  # of all, the names would lie upon each other
                    panel.annotate(name, (found["seconds"], gap), textcoords="offset points", fontsize=7, **side)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(xscale="log", title=family, xlabel="seconds of a merge")
        panel.set_ylim(bottom=-0.012)
        panel.set_yscale("symlog", linthresh=0.01)  # from a hundredth of a nat on, each tenfold has the same height
    panels[0][0].set_ylabel("distance to the experts, nats per answer token")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("what", choices=[*SKIPPED, "table", "picture"])
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--full-math", type=Path)
    parser.add_argument("--full-code", type=Path)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--only", nargs="+", choices=dict.fromkeys(each.method for each in SEARCHED.values()))
    parser.add_argument("--rows", type=int, default=40, help="test rows of each task")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="of the picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = {}
    for each in lines(options.results) if options.results.exists() else []:
        known[Case(**each.pop("case"))] = each
    if options.what == "picture":
        return draw(known, options.output)
    if options.what != "table":
        study(options, known)
    return print_tables(known)


def study(options: argparse.Namespace, known: Known) -> None:
    """Run the cases that are not known yet."""
    start, data, judge = time.perf_counter(), options.shared / "data", options.what == "judge"
    rows = test_rows(data, options.rows, SKIPPED[options.what])
    scorer = Scorer(options.base, rows, torch.float32 if judge else torch.bfloat16)
    for case in cases(options, known):
        if case in known or time.perf_counter() - start > 60 * options.minutes:
            continue
        experts = [options.shared / "real" / f"lora-{task}" for task in FAMILIES[case.family]]
        if case.family == "full":
            experts = [options.full_math, options.full_code]
        recipe = recipe_of(case, options.base, experts, data, options.results.with_suffix(".base.jsonl"))
        known[case] = run(case, scorer, recipe, apart=judge)
        with options.results.open("a") as file:
            file.write(json.dumps({"case": vars(case), **known[case]}) + "\n")
        print(case, known[case].get("seconds"), f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
