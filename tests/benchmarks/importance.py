"""What the importance pass costs: memory on a shallow and a deep model of one width, time against a plain forward pass.

    python -m tests.benchmarks.importance [--base DIR --rows FILE.jsonl]
    python -m tests.benchmarks.importance --official --base DIR --expert DIR --rows FILE.jsonl

Memory: anonymous resident memory (RssAnon, to which weights mapped from files do not count) at its peak above the start
of the pass, in a process of its own: the median of three, since one differs from the next by up to 15 %. Time: of one
pass over the rows' questions and answers against a plain forward pass without a head over the same samples in the same
batches, weights in memory; the two alternate, and the ratio is that of the fastest of each. The same rows as two sets,
in one pass and in two. `--official`: how far `preset: lewis_official` is from the authors' procedure on GSM8K, run in
fp32, and how long that takes next to our default pass over the same 15 rows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lewis.importance.batches import batches
from lewis.importance.calibration import Calibration
from lewis.importance.measure import measure_sets, network_of
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.models.checkpoint import Checkpoint
from lewis.models.model import Model
from lewis.recipe.recipe import Recipe
from tests.support import authors, pipeline
from tests.support.measuring import measure

WIDTH = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
ROUNDS = 3


def peak_of_pass(folder: Path) -> int:
    """The highest RssAnon during the pass above that before it."""
    model, start = Checkpoint(folder, "key"), anonymous_bytes()
    lengths = [256] * 16 + [100] * 16  # a batch of 4096 tokens, and one that waits next to it between two blocks
    samples = tuple(tuple(3 + (7 * i + j) % 900 for j in range(length)) for i, length in enumerate(lengths))
    with PeakMemory() as memory:
        measure(model, Calibration("rows", samples))
    return memory.peak - start


def write_model(folder: Path, layers: int) -> None:
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=layers, max_position_embeddings=512, **WIDTH)
    with torch.device("cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def memory() -> None:
    peaks = {}
    for layers in (24, 48):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), layers)
            command = [sys.executable, "-m", "tests.benchmarks.importance", "--peak-of", folder]
            runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(ROUNDS)]
            peaks[layers] = statistics.median(int(run.stdout) for run in runs)
            size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"{layers} layers: {size / 1e6:.0f} MB of weights in bf16, peak RssAnon {peaks[layers] / 1e6:.0f} MB")
    print(f"48 layers / 24 layers: {peaks[48] / peaks[24]:.3f}")


def fastest(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(base: Path, rows: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    with rows.open() as file:
        texts = [json.loads(line) for line, _ in zip(file, range(16), strict=False)]
    samples = tuple(tuple(tokenizer(f"{r['question']} {r['answer']}")["input_ids"][:512]) for r in texts)
    calibration, model = Calibration("rows", samples), Checkpoint(base, "key")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    made = batches([calibration], network_of(model), whole=False)

    def forward() -> None:
        with torch.inference_mode():
            for batch in made:
                plain.base_model(input_ids=batch.ids, use_cache=False)

    halves = [Calibration("even", samples[::2]), Calibration("odd", samples[1::2])]
    times: dict[str, list[float]] = {"plain": [], "pass": [], "together": [], "apart": []}
    forward()
    for _ in range(ROUNDS):
        times["plain"].append(fastest(forward))
        times["pass"].append(fastest(lambda: measure(model, calibration)))
        times["together"].append(fastest(lambda: measure_sets(model, halves)))
        times["apart"].append(fastest(lambda: [measure(model, half) for half in halves]))
    tokens = f"{calibration.tokens} tokens, {torch.get_num_threads()} threads"
    print(f"plain forward {min(times['plain']):.2f} s, importance pass {min(times['pass']):.2f} s ({tokens})")
    print(f"importance / plain: {min(times['pass']) / min(times['plain']):.3f}")
    print(
        f"the same rows as two sets: in one pass {min(times['together']):.2f} s, one by one {min(times['apart']):.2f} s"
    )


def official(base: Path, expert: Path, rows: Path) -> None:
    gsm8k = {"dataset": "json", "data_files": str(rows), "text": "{question} {answer}"}
    content = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(expert)}]}
    block = {"preset": "lewis_official", "calibrations": {"gsm8k": gsm8k}}
    recipe = Recipe.parse(yaml.safe_dump(content | {"lewis": block}), root=rows.parent)
    pinned, [source] = pipeline.pin_all(recipe)
    assert pinned is not None
    files = [pipeline.download(pinned), pipeline.download(source)]
    measured, allocated = pipeline.guide(recipe, files[0], files[1:])
    samples, theirs = authors.samples(rows, AutoTokenizer.from_pretrained(base)), []
    tokenizer = AutoTokenizer.from_pretrained(base)
    with rows.open() as file:
        texts = [f"{r['question']} {r['answer']}" for r in map(json.loads, file)]
    order = np.random.default_rng(42).permutation(len(texts))[: len(samples)]
    default = Calibration("gsm8k", tuple(tuple(tokenizer(texts[i])["input_ids"][:512]) for i in order))
    for label, entry, each in zip(("base", "expert"), measured, files, strict=True):
        model = _loaded(base, each.open())
        started = time.perf_counter(), time.process_time()
        theirs.append(authors.norms(model, samples))
        halfway = time.perf_counter(), time.process_time()
        measure(each.open(), default)
        ended = time.perf_counter(), time.process_time()
        (their_wall, their_cpu), (wall, cpu) = np.subtract(halfway, started), np.subtract(ended, halfway)
        gaps = {name: abs(entry.norms[name] / norm - 1) for name, norm in theirs[-1].items()}
        first = [gap for name, gap in gaps.items() if int(name.split(".")[2]) < 3]
        mean, most = np.mean(list(gaps.values())), max(gaps.values())
        print(
            f"{label}: gap of {len(gaps)} norms: first three layers {max(first):.1e} at most; all {mean:.2e} on average"
        )
        print(
            f"{label}: {most:.2e} at most; authors {their_wall:.1f} s ({their_cpu:.1f} s of CPU, {15 * 512} tokens), ",
            end="",
        )
        print(f"our default pass {wall:.1f} s ({cpu:.1f} s of CPU, {default.tokens} tokens)")
        print(f"{label}: authors / default: {their_wall / wall:.1f}, by CPU {their_cpu / cpu:.1f}")
    wanted = authors.densities(*theirs, 0.3, 0.8)
    found = allocated.experts()[files[1].ref].densities
    pairs = [(found[name], rho) for name, rho in wanted.items()]
    gap = max(abs(own - rho) for own, rho in pairs)
    print(
        f"densities: rank correlation {spearmanr(pairs)[0]:.4f}, largest gap {gap:.4f}, means {np.mean(pairs, axis=0)}"
    )


def _loaded(base: Path, model: Model) -> Any:
    """A model in fp32, its adapter merged."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name in model.tensors:
            parameters[name].copy_(model.read(name))
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--expert", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--official", action="store_true", help="compare with the authors' procedure, nothing else")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak_of_pass(options.peak_of))
        return
    if options.official:
        official(options.base, options.expert, options.rows)
        return
    memory()
    if options.base and options.rows:
        speed(options.base, options.rows)


if __name__ == "__main__":
    main()
