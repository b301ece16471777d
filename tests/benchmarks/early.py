"""Documents and seconds until the gate's verdict on real models: with all documents, and where scoring may end early.

    python -m tests.benchmarks.early FOLDER --tasks TASK ... --metric METRIC --model NAME=CHECKPOINT[,ADAPTER] ...
        --pair CHAMPION:CHALLENGER ... [--policy POLICY] [--limit N]

Nothing is kept between the two: each pair is scored again, both models, in an empty store. The seconds are those of the
evaluations, which include the start of a process and the loading of the model for each look.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lewis.evaluation.gate import Incumbent, judge
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.looks import FIRST, look_at
from lewis.evaluation.step import score, scored_models
from lewis.models.source import ModelFiles
from lewis.recipe.schema import Gate


def judged(gate: Gate, settings: EvalSettings, models: dict[str, ModelFiles], stop: str) -> tuple[bool, int, float]:
    """Whether the challenger passes, after how many documents of each task, and seconds."""
    documents, begun = FIRST if stop != "never" else None, time.monotonic()
    while True:
        found = {name: score(files, replace(settings, look=documents)) for name, files in models.items()}
        look = look_at(stop, documents, found["merged"].pools)
        champion = Incumbent("models:/m/1", "a" * 64)
        verdict = judge(gate, scored_models({}, found), "b" * 64, champion=champion, limit=settings.limit, look=look)
        if verdict.certain:
            print("    " + "; ".join(verdict.reasons), flush=True)
            return verdict.passed, documents or look.of, time.monotonic() - begun
        documents = look.after


def main() -> None:
    """Print a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--pair", action="append", required=True)
    parser.add_argument("--policy", default="not_worse")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--code", action="store_true", help="allow_code_execution")
    options = parser.parse_args()
    folders = dict(each.split("=", 1) for each in options.model)
    gate = Gate(metric=options.metric, policy=options.policy, allow_limit=True)
    settings = EvalSettings(
        tuple(options.tasks), options.folder.resolve(), limit=options.limit, allow_code_execution=options.code
    )
    for pair in options.pair:
        names, line = dict(zip(("champion", "merged"), pair.split(":"), strict=True)), []
        for stop in ("never", "known"):
            with tempfile.TemporaryDirectory() as home:
                os.environ["LEWIS_HOME"] = home
                places = {label: folders[name].split(",") for label, name in names.items()}
                models = {
                    label: ModelFiles.at(
                        label, f"{label}-{stop}", Path(place[0]), Path(place[1]) if place[1:] else None
                    )
                    for label, place in places.items()
                }
                passed, documents, seconds = judged(gate, settings, models, stop)
                line.append(f"{stop}: {'passes' if passed else 'fails'}, {documents} documents, {seconds:.0f} s")
        print(f"{options.policy}, {pair}: {'; '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
