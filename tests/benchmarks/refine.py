"""What training after the fit gives: the merged model learns what each expert predicts on that expert's own rows.

    python -m tests.benchmarks.refine FILE.jsonl NAME --rows DIR --base DIR --expert TASK=DIR ... [--epochs N]

Merges as `remedies run`, then trains all weights of the merged model on the rows that the fit has seen: KL divergence
from the expert's predictions to the model's at the answer tokens, no labels; AdamW, two rows of each expert a step, a
rate that falls to 0 by a cosine. FILE is one that `remedies table` prints: it gets a line for the fit and one for the
end. It prints the divergence on the held-back rows, which took no part in the training.
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lewis.importance.calibration import Calibration
from lewis.models.checkpoint import Checkpoint
from tests.benchmarks import remedies
from tests.benchmarks.oracles import InMemory, load
from tests.benchmarks.quality import MEMORY, Scorer
from tests.support import pipeline

Row = tuple[torch.Tensor, torch.Tensor]
"""Token ids, and the positions whose next token is an answer's."""

EACH = 2  # rows of each expert in a step
WARM_UP = 5  # steps


def rows_of(calibration: Calibration) -> list[Row]:
    """The rows that predict an answer token."""
    answers = calibration.of_answers
    assert answers.weights is not None
    pairs = [
        (torch.tensor(ids), torch.tensor(weights)[1:].nonzero()[:, 0])
        for ids, weights in zip(answers.samples, answers.weights, strict=True)
    ]
    return [(ids, positions) for ids, positions in pairs if len(positions)]


def divergence(expert: nn.Module, merged: nn.Module, row: Row) -> torch.Tensor:
    """KL divergence from the expert's predictions of the answer tokens to the merged model's, nats per token."""

    def predicted(network: nn.Module) -> torch.Tensor:
        hidden = network.model(input_ids=row[0][None], use_cache=False).last_hidden_state[0]
        return network.lm_head(hidden[row[1]]).log_softmax(-1)

    with torch.no_grad():
        wanted = predicted(expert)
    return (wanted.exp() * (wanted - predicted(merged))).sum(-1).mean()


def held_back(experts: list[nn.Module], merged: nn.Module, rows: list[list[Row]]) -> list[float]:
    with torch.no_grad():
        each = [[float(divergence(e, merged, row)) for row in own] for e, own in zip(experts, rows, strict=True)]
    return [round(sum(own) / len(own), 5) for own in each]


def train(options: argparse.Namespace, experts: list[nn.Module], merged: nn.Module, rows: list[list[Row]]) -> None:
    draw, steps = random.Random(0), options.epochs * max(map(len, rows)) // EACH
    optimizer = torch.optim.AdamW(merged.parameters(), lr=options.rate, weight_decay=0.0, betas=(0.9, 0.95))
    waiting: list[list[Row]] = [[] for _ in experts]
    for step in range(steps):
        share = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * share
        total = 0.0
        for expert, own, left in zip(experts, rows, waiting, strict=True):
            for _ in range(EACH):
                if not left:
                    left += draw.sample(own, len(own))
                loss = divergence(expert, merged, left.pop())
                loss.backward()
                total += loss.item() / EACH / len(experts)
        nn.utils.clip_grad_norm_(merged.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 7:
            print(f"step {step + 1} of {steps}, divergence {total:.5f}", flush=True)


def refine(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fit, score, train, score."""
    paths = dict(each.split("=", 1) for each in options.expert)
    scorer = Scorer(options.base, remedies.test_rows(options, paths, options.skip, options.count), torch.float32)
    recipe = remedies.recipe_of(options, paths, options.set or [])
    own = remedies.of_experts(paths, recipe, scorer)
    prepared = pipeline.prepare_merge(recipe, *pipeline.fetch(recipe))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        fit = prepared.run(Path(folder) / "merged").fit
        merged = load(options.base, Checkpoint(Path(folder) / "merged", prepared.digest))

    def found(name: str) -> dict[str, Any]:
        seconds, losses = round(time.perf_counter() - begun), scorer.losses(InMemory(merged))  # type: ignore[arg-type]
        found = {"losses": losses, "fit": fit, "seconds": seconds}
        print(f"{name}: held-back rows, by expert: {held_back(experts, merged, back)}", flush=True)
        return remedies.line(name, options, found, own)

    experts = [load(options.base, each.model) for each in prepared.experts]
    rows = [rows_of(each.calibration) for each in prepared.experts if each.calibration]
    back = [rows_of(each.held_back) for each in prepared.experts if each.held_back]
    yield found(f"{options.name}, the fit")
    merged.requires_grad_(True)
    begun = time.perf_counter()
    train(options, experts, merged, rows)
    yield found(f"{options.name}, trained for {options.epochs} epochs at {options.rate:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("name")
    remedies.add_options(parser)
    parser.add_argument("--set", action="append", help="a key of the recipe, as of lewis merge")
    parser.add_argument("--rate", type=float, default=1e-5, help="the learning rate")
    parser.add_argument("--epochs", type=int, default=2, help="how often each row is seen")
    options = parser.parse_args()
    for found in refine(options):
        with options.file.open("a") as file:
            file.write(json.dumps(found) + "\n")
        remedies.print_table([found])


if __name__ == "__main__":
    main()
