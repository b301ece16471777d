"""The recommended merge on FusionBench's seven GPT-2 classifiers of GLUE, next to the results that it publishes.

    python -m tests.benchmarks.gpt2_glue
    python -m tests.benchmarks.gpt2_glue --base DIR --experts DIR/{task} --rows DIR/{task}-{split}.jsonl

The first form needs a hub: openai-community/gpt2, tanganke/gpt2_TASK and nyu-mll/glue. The second takes local copies,
where `{task}` stands for the name of a task, and rows are JSON lines with the columns of GLUE. The backbone is merged
and each expert keeps its own head, as FusionBench has it: accuracy in per cent on the validation rows (MNLI: matched).
The published rows are of FusionBench's documentation, "GPT-2 Models for Text Classification".
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, GPT2ForSequenceClassification

from lewis.models.checkpoint import Checkpoint
from lewis.models.model import Model
from lewis.recipe.recipe import Recipe
from tests.benchmarks.quality import MEMORY, lines
from tests.support import pipeline

TEXTS = {  # task -> the text of a row: FusionBench gives both sentences to the tokenizer, which puts nothing between
    "cola": "{sentence}", "mnli": "{premise}{hypothesis}", "mrpc": "{sentence1}{sentence2}",
    "qnli": "{question}{sentence}", "qqp": "{question1}{question2}", "rte": "{sentence1}{sentence2}",
    "sst2": "{sentence}",
}  # fmt: skip
PUBLISHED = {
    "fine-tuned": (76.8, 82.1, 80.4, 88.3, 89.6, 65.3, 91.2),
    "simple average": (55.0, 55.1, 51.0, 57.6, 76.7, 44.8, 52.5),
    "Fisher merging": (54.8, 58.0, 39.5, 63.3, 81.5, 49.1, 64.7),
    "RegMean": (61.7, 70.4, 65.4, 69.7, 78.8, 56.0, 79.7),
    "task arithmetic, 0.5": (68.7, 68.6, 69.6, 70.5, 81.8, 47.3, 83.6),
    "TIES, 0.6": (68.4, 71.4, 68.4, 69.6, 82.4, 47.7, 81.8),
}
LONGEST, BATCH = 512, 32  # tokens of a row, rows of a batch


def rows_of(options: argparse.Namespace, task: str, split: str) -> list[dict[str, Any]]:
    if options.rows:
        return lines(Path(options.rows.format(task=task, split=split)))
    from datasets import load_dataset

    return list(load_dataset("nyu-mll/glue", task, split="validation_matched" if task == "mnli" else split))


def recipe_of(options: argparse.Namespace) -> Recipe:
    sets = {}
    for task, text in TEXTS.items():
        where = {"dataset": "nyu-mll/glue", "subset": task, "split": "train"}
        if options.rows:
            where = {
                "dataset": "json",
                "data_files": str(Path(options.rows.format(task=task, split="train")).resolve()),
            }
        sets[task] = {**where, "text": text, "samples": options.samples, "max_tokens": LONGEST}
    experts = {task: options.experts.format(task=task) for task in TEXTS}
    content = {
        "merge_method": "recommended",
        "base_model": options.base,
        "models": [{"model": model, "calibration": task} for task, model in experts.items()],
        "dtype": "float32",
        "lewis": {"calibrations": sets, "hold_back": False},  # which judges by the next token; these predict labels
    }
    return Recipe.parse(yaml.safe_dump(content), root=Path.cwd())


def batches(tokenizer: Any, texts: list[str]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Numbers of rows of one length, and their token ids: no row is padded."""
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"][:LONGEST]
        by_length.setdefault(len(ids), []).append((number, ids))
    for rows in by_length.values():
        for at in range(0, len(rows), BATCH):
            numbers, ids = zip(*rows[at : at + BATCH], strict=True)
            yield list(numbers), torch.tensor(ids)


@torch.inference_mode()
def accuracy(options: argparse.Namespace, task: str, folder: Path, backbone: Model | None, tokenizer: Any) -> float:
    """Per cent of the validation rows that an expert classifies rightly, with its own backbone or another."""
    model = GPT2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = -1  # the last token of a row classifies it
    own = {name.removeprefix("transformer."): each for name, each in model.named_parameters()}
    for name in backbone.tensors if backbone else ():
        if (short := name.removeprefix("transformer.")) in own and short != "score.weight":
            own[short].copy_(backbone.read(name))
    rows = rows_of(options, task, "validation")
    right = 0
    for numbers, ids in batches(tokenizer, [TEXTS[task].format(**row) for row in rows]):
        labels = torch.tensor([rows[number]["label"] for number in numbers])
        right += int((model(ids).logits.argmax(-1) == labels).sum())
    return 100 * right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="openai-community/gpt2")
    parser.add_argument("--experts", default="tanganke/gpt2_{task}")
    parser.add_argument("--rows", help="a path with {task} and {split} (train, validation); by default of the hub")
    parser.add_argument("--samples", type=int, default=256, help="calibration rows of each task")
    options = parser.parse_args()
    recipe = recipe_of(options)
    base, experts = pipeline.fetch(recipe)
    assert base is not None
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    found = {
        "fine-tuned, here": [
            accuracy(options, t, e.folder, None, tokenizer) for t, e in zip(TEXTS, experts, strict=True)
        ]
    }
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        merge = pipeline.prepare_merge(recipe, base, experts)
        merge.run(Path(folder) / "merged")
        merged = Checkpoint(Path(folder) / "merged", merge.digest)
        found["LEWIS, recommended"] = [
            accuracy(options, t, e.folder, merged, tokenizer) for t, e in zip(TEXTS, experts, strict=True)
        ]
    print(f"| method | {' | '.join(TEXTS)} | mean |\n{'| --- ' * (len(TEXTS) + 2)}|")
    for name, values in {**PUBLISHED, **found}.items():
        print(f"| {name} | {' | '.join(f'{each:.1f}' for each in values)} | {sum(values) / len(values):.1f} |")


if __name__ == "__main__":
    main()
