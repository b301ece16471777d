"""`lewis history`, `lewis promote` and `lewis rollback`: the champions of the registry."""

import argparse
import json
from dataclasses import asdict

from lewis.errors import InputError
from lewis_flows.cli.terminal import print_table


def history(options: argparse.Namespace) -> None:
    """Print who replaced whom as champion, the newest first."""
    from lewis.registry import history

    records = history.history(options.name)
    if options.json:
        print(json.dumps([asdict(each) for each in reversed(records)], indent=2, ensure_ascii=False))
    else:
        print_table(history.rows(records))


def version(command: argparse.ArgumentParser) -> None:
    """`NAME/VERSION` of a registered model."""
    command.add_argument("version", metavar="NAME/VERSION")


def promote(options: argparse.Namespace) -> None:
    """Make a version the champion.

    Raises:
        InputError: if what was given is not `NAME/VERSION`.
    """
    from lewis.registry import promotion

    name, _, number = options.version.removeprefix("models:/").rpartition("/")
    if not name or not number.isdecimal():
        raise InputError(f"expected NAME/VERSION, for example my-merge/3, got {options.version!r}")
    before = promotion.promote_by_hand(name, number, options.why)
    _tell()
    if options.json:
        print(json.dumps({"champion": f"models:/{name}/{number}", "before": before or None}, indent=2))
    else:
        print(f"models:/{name}/{number} is the champion" + (f" in place of {before}" if before else ""))


def rollback(options: argparse.Namespace) -> None:
    """Put the previous champion back."""
    from lewis.registry import promotion

    champion = promotion.rollback(options.name, options.why)
    _tell()
    if options.json:
        print(json.dumps({"champion": champion}, indent=2))
    else:
        print(f"{champion} is the champion again")


def _tell() -> None:
    """Tell the Prefect server that there is of the new champion; without one, the next to start is told."""
    from lewis_flows.service.api_key import connected
    from lewis_flows.service.servers import running

    if url := running():
        with connected(url):
            from lewis_tasks.support import moves

            moves.tell()
