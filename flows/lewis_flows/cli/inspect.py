"""`lewis new` and `lewis inspect`: what is found out about models before they are merged."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from lewis.errors import InputError
from lewis.settings import size_text
from lewis_flows.cli import arguments, bars
from lewis_flows.cli.arguments import flag, option
from lewis_flows.cli.terminal import print_table, show_log

NEW = (
    option("base", metavar="BASE", help="the base: org/name, org/name@revision or a folder"),
    option("experts", metavar="EXPERT", nargs="+", help="fine-tunes of it, or LoRA adapters"),
    option("-o", "--output", metavar="FILE.yaml", type=Path, required=True),
    flag("--force", "replace the file if there is one"),
)
_BASES = "another model that an expert may have been trained from, to find the nearest; may be repeated"
INSPECT = (
    option("--base", metavar="MODEL", action="append", default=[], dest="bases", help=_BASES),
    option("--plot", metavar="FILE.png", type=Path, help="draw layers by experts"),
)


def new(options: argparse.Namespace) -> None:
    """Write a recipe for a base and experts, with calibration sets and tasks that fit.

    Raises:
        InputError: if there is a file already, or a model does not exist or does not fit.
    """
    from lewis import store
    from lewis.inspection.draft import draft
    from lewis.store.writable import check_output_file
    from lewis_flows.cli import ask

    if options.output.suffix not in (".yaml", ".yml"):
        raise InputError(f"-o {options.output}: expected the name of a recipe, which ends in .yaml")
    file = check_output_file(options.output)
    if file.exists() and not options.force:
        raise InputError(f"-o {options.output}: there is a file already; choose another name, or say --force")
    show_log()
    asks = sys.stdin.isatty() and sys.stdout.isatty() and not options.json
    made = draft(options.base, options.experts, file, *([ask.rows_of] if asks else []))
    store.write_text(file, made.text)
    if options.json:
        findings = [each.to_json() for each in made.findings]
        facts = {"file": str(file), "calibrations": made.topics, "tasks": list(made.tasks), "findings": findings}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for expert, topic in made.topics.items():
        print(f"{expert}: calibrated on {topic}")
    print("".join(f"{each.to_text()}\n" for each in made.findings), end="")
    then = "" if asks else f"; read it, then `lewis plan {shlex.quote(str(options.output))}`"
    print(f"{options.output}: scored by {', '.join(made.tasks)}{then}")
    if asks:
        _look_and_run(file)


def _look_and_run(file: Path) -> None:
    """Show the plan of a new recipe and, if its models are here, what an inspection finds; offer to run it."""
    from lewis import library
    from lewis.steps.table import DOWNLOAD
    from lewis_flows.cli import ask
    from lewis_flows.cli.run import run_merge

    plan = library.plan(file)
    print(f"\n{plan.to_text()}\n")
    missing = [each for each in plan.steps if each.name.startswith(DOWNLOAD.name) and each.state != "cached"]
    if not missing:
        with bars.progress() as report:
            found = library.inspect(file, report=report)
        print("".join(f"{each.to_text()}\n" for each in found.findings) + found.verdict)
    size = sum(each.cost.written for each in missing)
    if ask.yes(f"run it now, which downloads {size_text(size)}?" if missing else "run it now?"):
        run_merge(str(file), [], as_json=False)


def inspect(options: argparse.Namespace) -> None:
    """Print how well the models of a recipe belong together: measures, findings and a verdict.

    Raises:
        InputError: if there are findings of level error.
    """
    from lewis import library, store
    from lewis.inspection import result

    recipe = arguments.load(options)
    plot = arguments.output_file(options, options.plot, "--plot") if options.plot else None
    show_log()
    with bars.progress() as report:
        found = library.inspect(recipe, candidates=options.bases, report=report)
    if plot:
        store.write_bytes(plot, result.draw(found))
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        for rows in (found.rows, found.pairs):
            if rows:
                print_table(rows)
        print("".join(f"{each.to_text()}\n" for each in found.findings) + found.verdict)
    if found.errors:
        raise InputError(found.verdict)
