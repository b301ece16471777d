"""What a merge that fits costs: time next to a plain forward pass and against its bars, memory by layers and by width.

    python -m tests.benchmarks.fitting --base DIR --shared DIR [--cases statistics regmean forward layers block]

Each case runs in processes of its own, and says what load there was: times count on two idle cores only.

statistics: the importance pass over an expert's calibration rows, without and with second-order statistics, against a
plain forward pass without a head over the same batches, weights in memory; they alternate, and the ratio is that of the
fastest of each.
regmean, forward: merges of SmolLM2-135M with its two LoRA experts (`real/lora-math` and `real/lora-code` in --shared),
32 calibration rows of at most 192 tokens each; wall time of the whole merge, and of the solves in it (of regmean: of
the whole fit, the statistics measured before).
layers: peak memory of random models of 24 and of 48 blocks, for regmean (the passes and the fit) and in forward order.
block: peak memory of one block of Llama-8B's size, two experts in bf16, 32 rows of 192 tokens each, alike.

Memory is anonymous resident memory (RssAnon) at its peak: of the whole process, and above the start of the merge.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lewis import store
from lewis.importance.batches import batches
from lewis.importance.calibration import Calibration
from lewis.importance.gram_files import Grams
from lewis.importance.grams import measure_grams, measured_by
from lewis.importance.measure import network_of
from lewis.importance.step import find_or_measure_grams
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.merging.fitting import static_fit
from lewis.merging.run import Merge
from lewis.merging.settings import Expert, resolve
from lewis.methods.arithmetic.regression import Inputs
from lewis.models.checkpoint import Checkpoint
from lewis.models.model import Model
from lewis.recipe.recipe import Recipe
from tests.support import pipeline
from tests.support.measuring import measure

CASES = ("statistics", "regmean", "forward", "layers", "block")
BARS = {"regmean": 10, "forward": 60}  # seconds on two idle cores: of the solves, of the merge
METHODS = ("regmean", "regmean_forward")
ROUNDS = 5
END = "<|im_end|>"
SETS = {
    "math": ("gsm8k/train.jsonl", f"Question: {{question}}\nAnswer: {{answer}}{END}"),
    "code": ("mbpp/train.jsonl", f"{{text}}\n{{test_list[0]}}\n{{code}}{END}"),
}
DEEP = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def statistics_passes(model: Model, calibration: Calibration) -> dict[str, Callable[[], Any]]:
    """What is timed against a plain forward pass, by its label."""

    def with_products() -> None:
        with tempfile.TemporaryDirectory() as folder:
            to, checksums = Path(folder) / "grams", dict[str, str]()
            with store.publish(to, {}, checksums=checksums) as scratch:
                checksums |= measure_grams(model, calibration, scratch)
            measured_by(model, calibration, Grams(to))

    return {
        "norms and moments": lambda: measure(model, calibration),
        "norms, moments and products": with_products,
    }


def statistics(base: Path, shared: Path) -> dict[str, float]:
    """Seconds of each pass, the fastest of several that alternate."""
    calibration = prepare("regmean", base, shared).experts[0].calibration
    assert calibration
    model = Checkpoint(base, "key")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    made = batches([calibration], network_of(model))

    def forward() -> None:
        with torch.inference_mode():
            for batch in made:
                plain.base_model(input_ids=batch.ids, use_cache=False)

    passes = {"plain forward": forward, **statistics_passes(model, calibration)}
    times: dict[str, list[float]] = {label: [] for label in passes}
    forward()
    for _ in range(ROUNDS):
        for label, run in passes.items():
            times[label].append(seconds_of(run))
    return {label: min(found) for label, found in times.items()}


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prepare(method: str, base: Path, shared: Path) -> Merge:
    """The merge of SmolLM2 with its two LoRA experts."""
    data = shared / "data"
    sets = {
        task: {"dataset": "json", "data_files": str(data / file), "text": text, "samples": 32, "max_tokens": 192}
        for task, (file, text) in SETS.items()
    }
    content: dict[str, Any] = {"merge_method": method, "base_model": str(base), "lewis": {"calibrations": sets}}
    content["models"] = [{"model": str(shared / "real" / f"lora-{task}"), "calibration": task} for task in SETS]
    recipe = Recipe.parse(yaml.safe_dump({**content, "dtype": "bfloat16"}), root=data)
    pinned, sources = pipeline.pin_all(recipe)
    assert pinned is not None
    return pipeline.prepare_merge(recipe, pipeline.download(pinned), [pipeline.download(each) for each in sources])


def timed(merge: Merge) -> dict[str, float]:
    """Seconds and memory of a merge."""
    solve, fit, solves = Inputs.solve, static_fit.fit, [0.0]

    def watched(run: Any) -> Any:
        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = run(*given, **named)
            solves[0] += time.perf_counter() - start
            return found

        return timed

    if merge.method.fits == "static":  # its solves run side by side
        static_fit.fit = watched(fit)
    else:
        Inputs.solve = watched(solve)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        start, cpu, before = time.perf_counter(), time.process_time(), anonymous_bytes()
        with PeakMemory() as memory:
            merge.run(Path(folder) / "merged")
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens = sum(each.calibration.tokens for each in merge.experts if each.calibration)
    peaks = {"peak": memory.peak, "above_start": memory.peak - before}
    return {"seconds": seconds, "cpu": cpu, "solves": solves[0], "tokens": tokens, **peaks}


def write_models(folder: Path, layers: int, sizes: dict[str, int]) -> None:
    """A random base and two experts of it, in bf16, with a small vocabulary."""
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=layers, max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    for name in ("a", "b"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=torch.bfloat16), alpha=1e-3)
        model.save_pretrained(folder / name)


def of_random_models(method: str, folder: Path, rows: int, tokens: int) -> Merge:
    """The merge of what `write_models` wrote."""
    names = ("a", "b")
    content: dict[str, Any] = {"merge_method": method, "base_model": str(folder / "base")}
    content["models"] = [{"model": str(folder / name), "calibration": name} for name in names]
    content["lewis"] = {"calibrations": {name: {"texts": ["x"], "samples": 1} for name in names}}
    base, experts = Checkpoint(folder / "base", "base"), []
    for i, name in enumerate(names):
        samples = tuple(tuple(3 + (7 * i + 11 * row + j * j) % 900 for j in range(tokens)) for row in range(rows))
        model = Checkpoint(folder / name, name)
        experts.append(Expert(str(folder / name), model, calibration=Calibration(name, samples)))
    return Merge.of(resolve(Recipe.parse(yaml.safe_dump(content), root=folder)), base, experts)


def in_child(*given: object) -> Any:
    """What a call of this module in a process of its own prints, as JSON."""
    command = [sys.executable, "-m", "tests.benchmarks.fitting", "--child", *map(str, given)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def child(case: str, *given: str) -> Any:
    """One case, in this process."""
    if case == "write":
        return write_models(Path(given[0]), int(given[1]), DEEP if given[2] == "deep" else WIDE)
    if case == "random":
        os.environ["LEWIS_HOME"] = str(Path(given[1]) / "home")
        return timed(of_random_models(given[0], Path(given[1]), int(given[2]), int(given[3])))
    base, shared = Path(given[0]), Path(given[1])
    if case == "statistics":
        return statistics(base, shared)
    merge = prepare({"forward": "regmean_forward"}.get(case, case), base, shared)
    for expert in merge.experts if case == "regmean" else ():
        assert expert.calibration
        find_or_measure_grams(expert.model, expert.calibration)
    return timed(merge)


def peak_of(method: str, layers: int, kind: str, rows: int, tokens: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        in_child("write", folder, layers, kind)
        return dict(in_child("random", method, folder, rows, tokens))


def memory_of(found: dict[str, float]) -> str:
    whole, above = found["peak"] / 1e9, found["above_start"] / 1e9
    return f"peak {whole:.2f} GB, {above:.2f} GB above the start ({found['seconds']:.0f} s)"


def run(case: str, base: Path, shared: Path) -> None:
    if case == "statistics":
        found = in_child(case, base, shared)
        for label, seconds in found.items():
            print(f"{label}: {seconds:.2f} s, {seconds / found['plain forward']:.3f} of the plain forward")
    elif case in BARS:
        found = in_child(case, base, shared)
        told = f"{found['seconds']:.1f} s, {found['solves']:.1f} s of it in solves, {found['cpu']:.0f} s of CPU"
        bar = "its solves" if case == "regmean" else "all of it"
        print(f"{case}: {told}, {found['tokens']:.0f} tokens; {bar} shall take {BARS[case]} s; {memory_of(found)}")
    elif case == "layers":
        for method in METHODS:
            peaks = {layers: peak_of(method, layers, "deep", rows=8, tokens=128) for layers in (24, 48)}
            for layers, found in peaks.items():
                print(f"{method}, {layers} blocks: {memory_of(found)}")
            print(f"48 blocks / 24 blocks: {peaks[48]['peak'] / peaks[24]['peak']:.3f}")
    else:
        for method in METHODS:
            found = peak_of(method, 1, "wide", rows=32, tokens=192)
            print(f"{method}, one block of Llama-8B's size: {memory_of(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    for case in options.cases:
        print(f"load before {case}: {os.getloadavg()[0]:.1f}", flush=True)
        run(case, options.base, options.shared)


if __name__ == "__main__":
    main()
