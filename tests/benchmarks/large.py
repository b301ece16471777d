"""A merge of a model of Llama-3.1-8B's shape, by `lewis plan` and `lewis merge`: memory and time.

    python -m tests.benchmarks.large write DIR --base DIR [--layers 32] [--texts 16]
    python -m tests.benchmarks.large run DIR

`write` writes a model of random bf16 weights (16 GB, eight layers in a shard) with the tokenizer of --base, two
random LoRA adapters of rank 16 on all linear layers, and a recipe of them that fits in forward order, the default,
with that many texts of 128 tokens for each. `run` plans and merges, in processes of their own with an empty store. It
prints what they print, what the kernel counts, and how long it took.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lewis.memory import anonymous_bytes, peak_resident_bytes

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128_256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
SHARD = 8  # layers in a shard
RANK = 16
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he"]
TOKENS, TASKS = 128, ("first", "second")


def write(folder: Path, base: Path, layers: int, texts: int) -> None:
    """Write the model, its adapters and the recipe."""
    torch.manual_seed(0)
    model = folder / "model"
    model.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(model)
    with torch.device("meta"):
        of_model = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()}
    for path in base.glob("tokenizer*"):
        shutil.copy(path, model)
    shard_of = {}
    for name in of_model:
        number = re.match(r"model\.layers\.(\d+)", name)
        shard_of[name] = f"model-{1 + int(number[1]) // SHARD if number else 0}.safetensors"
    for shard in sorted(set(shard_of.values())):
        tensors = {}
        for name in (name for name, where in shard_of.items() if where == shard):
            weights = torch.ones if len(of_model[name]) == 1 else torch.randn
            scale = 1 if len(of_model[name]) == 1 else 0.02
            tensors[name] = (weights(of_model[name]) * scale).to(torch.bfloat16)
        save_file(tensors, model / shard, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    linear = {name: shape for name, shape in of_model.items() if "_proj" in name}
    for task in TASKS:
        adapter = folder / task
        adapter.mkdir()
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
        modules = sorted({name.split(".")[-2] for name in linear})
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": modules}))
        factors = {}
        for name, (rows, columns) in linear.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.002
        save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    draw = random.Random(0)
    sets = {
        task: {"texts": [" ".join(draw.choices(WORDS, k=TOKENS)) for _ in range(texts)], "max_tokens": TOKENS}
        for task in TASKS
    }
    models = [{"model": f"./{task}", "calibration": task} for task in TASKS]
    recipe = {"merge_method": "recommended", "base_model": "./model", "models": models, "lewis": {"calibrations": sets}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def run(folder: Path) -> None:
    """Plan and merge in processes of their own, and print what they say and what the kernel counts."""
    home, merged = folder / "home", folder / "merged"
    for each in (home, merged):
        shutil.rmtree(each, ignore_errors=True)
    environment = {**os.environ, "LEWIS_HOME": str(home), "TMPDIR": str(folder)}
    lewis = [sys.executable, "-m", "lewis_flows.cli.main"]
    for command in (["plan", "recipe.yaml"], ["merge", "recipe.yaml", "-o", str(merged)]):
        begun, resident, anonymous = time.monotonic(), 0, 0
        process = subprocess.Popen([*lewis, *command], cwd=folder, env=environment)
        while process.poll() is None:
            resident = max(resident, peak_resident_bytes(process.pid))
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            time.sleep(0.5)
        seconds, used = time.monotonic() - begun, os.times().children_user
        print(f"lewis {command[0]}: exit code {process.wait()}, {seconds:.0f} s, {used:.0f} s of CPU until now")
        print(f"peak resident {resident / 1e9:.2f} GB; anonymous {anonymous / 1e9:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one, two = commands.add_parser("write"), commands.add_parser("run")
    for each in (one, two):
        each.add_argument("folder", type=Path)
    one.add_argument("--base", type=Path, required=True)
    one.add_argument("--layers", type=int, default=32)
    one.add_argument("--texts", type=int, default=16, help="of each expert")
    options = parser.parse_args()
    if options.command == "write":
        write(options.folder, options.base, options.layers, options.texts)
    else:
        run(options.folder)


if __name__ == "__main__":
    main()
