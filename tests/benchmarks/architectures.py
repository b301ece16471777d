"""Every text-generation architecture of the installed transformers, tiny and random: guided merges that are right.

    python -m tests.benchmarks.architectures                     # all, some 6 minutes on one core; prints the table
    python -m tests.benchmarks.architectures qwen3_vl mixtral    # these

What is checked of each: `tests.support.architecture_check.check`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lewis.errors import LewisError
from tests.support.architecture_check import Checked, check
from tests.support.tiny_architectures import architectures, tiny


@dataclass(frozen=True)
class Outcome:
    """Of one model type: what was checked, or why it is refused or wrong; neither if it cannot be built tiny."""

    kind: str
    checked: Checked | None = None
    refused: str = ""
    wrong: str = ""


def main(kinds: list[str]) -> int:
    """Check the given model types, or all; print one line each, then the table. Gives 1 if one is wrong."""
    torch.set_num_threads(1)
    outcomes = []
    for kind in kinds or architectures():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LEWIS_HOME"] = f"{folder}/home"
            outcomes.append(_outcome(kind, Path(folder)))
        print(_line(outcomes[-1]), flush=True)
    print(table(outcomes))
    return int(any(each.wrong for each in outcomes))


def _outcome(kind: str, folder: Path) -> Outcome:
    try:
        tiny(kind)
    except Exception:  # its config cannot be shrunk by rule, or a library that it needs is not installed
        return Outcome(kind)
    try:
        return Outcome(kind, check(kind, folder))
    except LewisError as error:
        return Outcome(kind, refused=" ".join(str(error).replace(str(folder), "").split()))
    except Exception as error:  # whatever it is, it is wrong
        return Outcome(kind, wrong=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _line(outcome: Outcome) -> str:
    if outcome.checked:
        found = outcome.checked
        share = f"{100 * found.covered:.0f} % of its blocks"
        return f"right   {outcome.kind}: {share}, {found.moments} moments{_left(found)}"
    told = outcome.refused or outcome.wrong or "cannot be built tiny"
    return f"{'refused' if outcome.refused else 'WRONG  ' if outcome.wrong else '-      '} {outcome.kind}: {told}"


def table(outcomes: list[Outcome]) -> str:
    """Families by the share of the parameters of their blocks that is covered."""
    built = [each for each in outcomes if each.checked or each.refused or each.wrong]
    right = [each for each in built if each.checked]
    lines = [
        f"{len(built)} of {len(outcomes)} can be built tiny; of these {len(right)} are right in every way "
        f"({100 * len(right) / max(len(built), 1):.0f} %).",
        "",
        "| covered | families |",
        "| --- | --- |",
    ]
    found = [(each.kind, each.checked) for each in right if each.checked]
    lines.append(f"| 95 % or more | {', '.join(kind for kind, checked in found if checked.covered >= 0.95)} |")
    less = sorted((-round(100 * checked.covered), kind, checked) for kind, checked in found if checked.covered < 0.95)
    lines += [f"| {-share} % | {kind}{_left(checked)} |" for share, kind, checked in less]
    lines.append(f"| refused in a sentence | {', '.join(each.kind for each in built if each.refused)} |")
    lines += [f"| wrong | {each.kind}: {each.wrong} |" for each in built if each.wrong]
    missing = [each.kind for each in outcomes if each not in built]
    return "\n".join([*lines, f"| not built tiny | {', '.join(missing)} |"])


def _left(found: Checked) -> str:
    return f"; left: {found.left}" if found.left else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
