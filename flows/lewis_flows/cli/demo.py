"""`lewis demo`: the whole DAG on a family of tiny models that is trained first."""

import argparse

from lewis_flows.cli import bars
from lewis_flows.cli.run import run_merge


def demo(options: argparse.Namespace) -> None:
    """Make the family in the store, then run its recipe."""
    from lewis import store
    from lewis.demo.family import make_family

    with bars.progress() as report:
        folder = make_family(store.home() / "demo", lambda what, part: report(what, int(1000 * part), 1000))
    run_merge(str(folder / "demo.yaml"), [], as_json=options.json)
