"""What benchmarks of flows share: models and recipes to run, and how a figure is printed next to its bar."""

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

RECIPE = """
merge_method: ties
base_model: org/base
models: [%(models)s]
lewis:
  calibrations: {words: {dataset: json, data_files: words.jsonl, text: "{text}", samples: 256, max_tokens: 64}}
register: {name: %(name)s}
"""


def write_family(folder: Path, experts: list[str], *, layers: int, hidden: int) -> dict[str, Path]:
    """A random base and fine-tunes of it, by name."""
    from tests.support.models import write_expert, write_llama

    base = write_llama(folder / "base", layers=layers, hidden=hidden)
    return {"base": base, **{n: write_expert(base, folder / n, seed=i) for i, n in enumerate(experts, 200)}}


def write_release(base: Path, folder: Path, *, seed: int) -> Path:
    """One more fine-tune."""
    from tests.support.models import write_expert

    return write_expert(base, folder, seed=seed)


def write_recipe(folder: Path, name: str, experts: list[str]) -> Path:
    """A recipe of models on the Hub that measures and registers and scores nothing, next to its data."""
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices([f"w{i}" for i in range(60)], k=60))} for _ in range(256)]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = ", ".join(f"{{model: org/{expert}, parameters: {{weight: 1.0}}}}" for expert in experts)
    (folder / f"{name}.yaml").write_text(RECIPE % {"models": models, "name": name})
    return folder / f"{name}.yaml"


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def row(name: str, value: str, verdict: str = "") -> None:
    print(f"  {name:<72}{value:>16}  {verdict}".rstrip(), flush=True)


def both(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} / {max(values):.1f} s"


def bar(name: str, value: float, limit: float, unit: str = "s") -> bool:
    """Print a number next to its bar; whether it is below."""
    row(name, f"{value:.1f} {unit}", f"bar {limit} {unit}: {'met' if value < limit else 'MISSED'}")
    return value < limit


def verdict(name: str, met: bool) -> bool:
    """Print whether something holds that is no number; the same is returned."""
    row(f"  {name}", "met" if met else "MISSED")
    return met
