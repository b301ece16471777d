"""`lewis inspect`: whether the models of a recipe belong together, before they are merged."""

import argparse
import json
from pathlib import Path

from lewis.errors import InputError
from lewis_flows.cli import arguments, bars
from lewis_flows.cli.terminal import print_table, show_log


def inspect_options(command: argparse.ArgumentParser) -> None:
    """`--base MODEL` and `--plot FILE.png`."""
    command.add_argument(
        "--base", metavar="MODEL", action="append", default=[], dest="bases",
        help="another model that an expert may have been trained from, to find the nearest; may be repeated",
    )  # fmt: skip
    command.add_argument("--plot", metavar="FILE.png", type=Path, help="draw layers by experts")


def inspect(options: argparse.Namespace) -> None:
    """Print measures, findings and a verdict.

    Raises:
        InputError: if there are findings of level error.
    """
    from lewis import store
    from lewis.inspection import result
    from lewis.pipeline import inspect_recipe
    from lewis.store.writable import check_output_file

    recipe = arguments.load(options)
    plot = check_output_file(options.plot) if options.plot else None
    show_log()
    with bars.progress() as report:
        found = inspect_recipe(recipe, options.bases, report)
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
