"""`lewis merge` next to mergekit, both as whole processes, in turn, on the same warm files.

    LEWIS_MERGEKIT=VENV/bin/python python -m tests.benchmarks.merge_vs_mergekit --folder DIR
    LEWIS_MERGEKIT=VENV/bin/python python -m tests.benchmarks.merge_vs_mergekit --folder DIR --size 0.1 --methods all
    python -m tests.benchmarks.merge_vs_mergekit --folder DIR --table

A method may be named with one setting. The first form prints, for each method, wall time, CPU time and peak anonymous
memory of both, their ratios, and the ratio to the floor: all inputs read and an output of the same size written, by
plain copies. The last form prints the table of model sizes and numbers of experts for `lewis merge` alone. Models are
Llama-shaped, random, bf16, of one layer width; those that DIR has already are used again.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lewis.memory import anonymous_bytes
from lewis.methods import METHODS as METHODS_OF_LEWIS
from lewis.models.files.writer import CheckpointWriter

MERGEKIT = os.environ.get("LEWIS_MERGEKIT")
LAYERS = {"0.1": 2, "0.45": 16, "1.5": 58}  # of 25.2 M parameters, next to an embedding of 49 M
EXPERTS = (1, 3, 8)
METHODS = ("ties", "dare_ties", "linear")
ALL = (
    *METHODS, "task_arithmetic", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce",
    "model_stock", "multislerp", "karcher", "nuslerp", "slerp", "ram", "ramplus_tl", "nearswap", "arcee_fusion",
    "sce:select_topk=0.5", "model_stock:filter_wise=true", "nuslerp:nuslerp_flatten=false", "consensus", "pcb",
)  # fmt: skip
OURS_ALONE = ("consensus", "pcb")
WITHOUT_BASE = ("linear", "nuslerp", "karcher")
AT_MOST = {"nuslerp": 2, "slerp": 1, "nearswap": 1, "arcee_fusion": 1}  # experts
HIDDEN, INNER, KEYS, VOCABULARY = 1536, 4096, 512, 32000
BARS = {"ties": 20, "dare_ties": 8, "linear": 3}  # times faster than mergekit, at 0.45 B and three experts
MEMORY_BAR = 600e6
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


@dataclass(frozen=True)
class Taken:
    """What one process took: wall and CPU seconds, and the peak of its tree's anonymous memory in bytes."""

    wall: float
    cpu: float = 0.0
    peak: int = 0


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description="lewis merge next to mergekit")
    parser.add_argument("--folder", type=Path, required=True, help="for models, results and the store")
    parser.add_argument("--size", choices=LAYERS, nargs="+", help="billions of parameters; 0.45, or all")
    parser.add_argument("--experts", type=int, nargs="+", help="how many; 3, or 1, 3 and 8")
    parser.add_argument("--methods", choices=[*ALL, "all"], nargs="+", default=METHODS)
    parser.add_argument("--rounds", type=int, default=1, help="times each runs; medians are printed")
    parser.add_argument("--table", action="store_true", help="sizes x experts, ties, LEWIS alone")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.table:
        return table(options.folder, options.size or list(LAYERS), options.experts or EXPERTS, options.rounds)
    if not MERGEKIT:
        parser.error("LEWIS_MERGEKIT names no python that has mergekit")
    met = [
        compare(options.folder, size, count, method, options.rounds)
        for size in options.size or ["0.45"]
        for count in options.experts or [3]
        for method in (ALL if "all" in options.methods else options.methods)
    ]
    return 0 if all(met) else 1


def compare(folder: Path, size: str, count: int, method: str, rounds: int) -> bool:
    """Print how both do at one merge; whether the bars are met."""
    kind = method.partition(":")[0]
    base, experts = family(folder, size, min(count, AT_MOST.get(kind, count)))
    recipe, out = write_recipe(folder, method, base, experts), folder / "out"
    theirs = [str(MERGEKIT), "-m", "mergekit.scripts.run_yaml", str(recipe), str(out), "--quiet", "--no-copy-tokenizer"]
    inputs = experts if kind in WITHOUT_BASE else [base, *experts]
    floor(inputs, out)  # warms the files
    shutil.rmtree(folder / "home", ignore_errors=True)  # it remembers the hashes of inputs
    first = run(lewis(recipe, out), folder)
    floors, ours, others = [], [], []
    for _ in range(rounds):
        floors.append(floor(inputs, out))
        ours.append(run(lewis(recipe, out), folder))
        others.append(Taken(math.nan) if method in OURS_ALONE else run(theirs, folder))
    least, mine, other = (middle(each) for each in (floors, ours, others))
    gb = weights(experts[0]) * (len(inputs) + 1) / 1e9
    print(f"\n{method}, {size} B, {len(experts)} experts, {gb:.2f} GB in and out")
    print(f"  floor     {least.wall:7.2f} s")
    for name, took in (("lewis", mine), ("first", first), ("mergekit", other))[: 2 if method in OURS_ALONE else 3]:
        print(f"  {name:<9} {took.wall:7.2f} s {took.cpu:7.2f} s of CPU {took.peak / 1e6:7.0f} MB")
    if method in OURS_ALONE:
        return True
    faster = other.wall / mine.wall
    print(f"  wall: {faster:.1f} times faster than mergekit, {other.wall / first.wall:.1f} if inputs must be hashed")
    print(f"  memory: {mine.peak / other.peak:.3f} of mergekit's;  wall to the floor: {mine.wall / least.wall:.1f}")
    if (size, count) != ("0.45", 3) or method not in BARS:
        return True
    told = [
        (f"at least {BARS[method]} times faster", faster >= BARS[method]),
        (f"at most {MEMORY_BAR / 1e6:.0f} MB", mine.peak <= MEMORY_BAR),
    ]
    print("\n".join(f"  bar: {name}: {'met' if met else 'MISSED'}" for name, met in told), flush=True)
    return all(met for _, met in told)


def table(folder: Path, sizes: Sequence[str], counts: Sequence[int], rounds: int) -> int:
    """Print the Markdown table of sizes and experts; whether memory is flat is for its reader to see."""
    print("| parameters | experts | GB in and out | seconds | of CPU | GB/s | peak MB |\n" + "| --- " * 7 + "|")
    for size in sizes:
        for count in counts:
            base, experts = family(folder, size, count)
            recipe, out = write_recipe(folder, "ties", base, experts), folder / "out"
            floor([base, *experts], out)
            run(lewis(recipe, out), folder)  # hashes the inputs
            took = middle([run(lewis(recipe, out), folder) for _ in range(rounds)])
            size_gb = weights(base) * (count + 2) / 1e9
            cells = (
                f"{size_gb:.2f} | {took.wall:.2f} | {took.cpu:.2f} | {size_gb / took.wall:.2f} | {took.peak / 1e6:.0f}"
            )
            print(f"| {size} B | {count} | {cells} |", flush=True)
    return 0


def lewis(recipe: Path, out: Path) -> list[str]:
    """The command of our merge."""
    return [sys.executable, "-m", "lewis_flows.cli.main", "merge", str(recipe), "-o", str(out), "--json"]


def run(command: list[str], folder: Path) -> Taken:
    """Run a process to its end into an absent `out`."""
    settle(folder / "out")
    environment = {**os.environ, "LEWIS_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    with (folder / "log.txt").open("wb") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        peaks, ended = [0], threading.Event()
        watching = threading.Thread(target=watch, args=(process.pid, peaks, ended))
        watching.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        ended.set()
        watching.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return Taken(wall, usage.ru_utime + usage.ru_stime, peaks[0])


def watch(process: int, peaks: list[int], ended: threading.Event) -> None:
    """Keep the largest sum of anonymous memory over a process and what it started."""
    while not ended.wait(0.03):
        peaks[0] = max(peaks[0], sum(anonymous_bytes(each) for each in tree(process)))


def tree(process: int) -> list[int]:
    """A process and all that descend from it."""
    found = [process]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue  # that thread has ended
    return found


def floor(inputs: list[Path], out: Path) -> Taken:
    """Read all inputs, and write the first again, through one buffer."""
    settle(out)
    out.mkdir()
    buffer, begun = memoryview(bytearray(1 << 23)), time.perf_counter()
    for number, folder in enumerate(inputs):
        sink = out / "model.safetensors" if number == 0 else Path(os.devnull)
        with (folder / "model.safetensors").open("rb", buffering=0) as file, sink.open("wb", buffering=0) as copy:
            while read := file.readinto(buffer):
                copy.write(buffer[:read])  # to nowhere, it costs nothing
    return Taken(time.perf_counter() - begun)


def settle(out: Path) -> None:
    """Remove an earlier result, and let the system write what it still holds."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def middle(taken: list[Taken]) -> Taken:
    """Medians; of memory the most."""
    return Taken(
        statistics.median(each.wall for each in taken),
        statistics.median(each.cpu for each in taken),
        max(each.peak for each in taken),
    )


def weights(folder: Path) -> int:
    """Bytes of a model's file."""
    return (folder / "model.safetensors").stat().st_size


def family(folder: Path, size: str, count: int) -> tuple[Path, list[Path]]:
    """A base and its experts, made where they are not there yet."""
    paths = [folder / f"{size}b-{name}" for name in ("base", *map(str, range(1, count + 1)))]
    for number, path in enumerate(paths):
        if not (path / "config.json").exists():
            write_model(path, LAYERS[size], number)
    return paths[0], paths[1:]


def write_model(folder: Path, layers: int, number: int) -> None:
    """Random weights; those of an expert (a number above 0) are the base's plus a tenth as much noise.

    Normal numbers are drawn once and cut at another place for each tensor: drawing them all would take longer than all
    the rest.
    """
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}{name}.weight": shape for name, shape in PROJECTIONS.items()}
        shapes |= {f"{block}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pools = [
        factor * torch.randn(1 << 24, generator=torch.Generator().manual_seed(seed))
        for seed, factor in ((0, 0.02), (number, 0.002))[: 1 + (number > 0)]
    ]
    with CheckpointWriter(folder, {name: ("BF16", shape) for name, shape in shapes.items()}, 10**12) as writer:
        for place, (name, shape) in enumerate(shapes.items()):
            elements = torch.Size(shape).numel()
            drawn = sum(cut(pool, elements, 104729 * place + 7919 * i) for i, pool in enumerate(pools))
            writer.write(name, (drawn + (len(shape) == 1)).to(torch.bfloat16).reshape(shape))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 24, "num_key_value_heads": 8,
        "vocab_size": VOCABULARY, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))  # last: a folder that has it is whole


def cut(pool: torch.Tensor, elements: int, start: int) -> torch.Tensor:
    """So many numbers of a pool, from a place on, around its end."""
    start %= len(pool)
    times = -(-(start + elements) // len(pool))
    return pool.repeat(times)[start : start + elements]


def known(method: str, **parameters: Any) -> dict[str, Any]:
    """The parameters that a method has."""
    return {key: value for key, value in parameters.items() if key in METHODS_OF_LEWIS[method].parameters}


def write_recipe(folder: Path, method: str, base: Path, experts: list[Path]) -> Path:
    """One config for both: a density for each projection of each layer as a filter, as `lewis export` writes it."""
    method, _, setting = method.partition(":")
    layers, models = json.loads((base / "config.json").read_text())["num_hidden_layers"], []
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(layers) for name in PROJECTIONS]
    for number, path in enumerate(experts):
        draw = random.Random(number)
        filters = [{"filter": name, "value": round(draw.uniform(0.3, 0.8), 4)} for name in names]
        filters.sort(key=lambda rule: (-len(str(rule["filter"])), rule["filter"]))
        own = known(method, weight=1.0, density=filters)
        models.append({"model": str(path.resolve()), **({"parameters": own} if own else {})})
    data: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method not in WITHOUT_BASE:
        data["base_model"] = str(base.resolve())
        data["parameters"] = known(method, normalize=True, t={"slerp": 0.3, "nearswap": 0.001}.get(method))
    if method in ("slerp", "nearswap", "arcee_fusion"):
        models.insert(0, {"model": str(base.resolve())})
    if setting:
        data["parameters"] = data.get("parameters", {}) | yaml.safe_load(setting.replace("=", ": "))
    recipe = folder / f"{method}.yaml"
    recipe.write_text(yaml.safe_dump(data, sort_keys=False))
    return recipe


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
