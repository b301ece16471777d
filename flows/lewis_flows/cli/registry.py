"""`lewis history`, `served`, `pull`, `approve`, `promote` and `rollback`: the versions of the registry."""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from lewis.errors import InputError, LewisError
from lewis.settings import size_text
from lewis_flows.cli import completion
from lewis_flows.cli.arguments import flag, option

HISTORY = (
    flag("--verbose", "tell the rules that passed, too"),
    option("--plot", metavar="FILE.png", type=Path, help="draw the champion's score over the versions"),
)
SERVED = option("name", metavar="NAME", nargs="?", default="", help="by default all models", offer=completion.models)
PULL = (
    option(
        "what",
        metavar="NAME[@ALIAS|/VERSION]",
        help="its champion by default",
        offer=completion.models_and_versions,
    ),
    option("-o", "--output", metavar="DIR", type=Path, required=True, help="folder to write"),
)
VERSION = option("version", metavar="NAME/VERSION", offer=completion.versions)
BAD = option(
    "what",
    metavar="NAME[/VERSION]",
    help="registered model, and the version to take back: it must be the champion",
    offer=completion.models_and_versions,
)
REFUSE = flag("--refuse", "it does not become the champion, and is not asked for again")


def history(options: argparse.Namespace) -> None:
    """Print which version replaced which as champion of a model, an entry per line, the newest first."""
    from lewis import store
    from lewis.registry import history
    from lewis.store.writable import check_output_file

    plot = check_output_file(options.plot, "--plot") if options.plot else None
    records = history.history(name := _model(options.name))
    if plot:
        store.write_bytes(plot, history.picture(name))
    if options.json:
        print(json.dumps([asdict(each) for each in reversed(records)], indent=2, ensure_ascii=False))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in history.lines(records, verbose=options.verbose):
        print(line if width is None or len(line) <= width else f"{line[: width - 1]}…")


def served(options: argparse.Namespace) -> None:
    """Print which version each target serves, a line per target, and which version it did not take."""
    from lewis.serving.records import served

    found = served(_model(options.name))
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2, ensure_ascii=False))
        return
    for each in found:
        print(f"{each.name} {each.line()}")
    if not found:
        print("nothing is in service")


def pull(options: argparse.Namespace) -> None:
    """Write a version of a registered model into a folder."""
    from lewis.registry.pull import pull
    from lewis.store.writable import check_output_folder

    found = pull(options.what, check_output_folder(options.output))
    facts = {"version": found.uri, "folder": str(options.output), "digest": found.digest, "bytes": found.size}
    text = f"{options.output}: {found.uri}, {size_text(found.size)}, digest {found.digest}"
    print(json.dumps(facts, indent=2) if options.json else text)


def approve(options: argparse.Namespace) -> None:
    """Approve a version that waits for a person, which makes it the champion, or with `--refuse` refuse it.

    Raises:
        InputError: if what was given is not `NAME/VERSION`, or the service of this store has another MLflow.
    """
    from lewis.registry import promotion
    from lewis_flows.service.servers import check_mlflow_as_served

    check_mlflow_as_served()
    name, number = _named(options.version)
    if options.refuse:
        promotion.refuse(name, number, options.why)
        _report(f"models:/{name}/{number}", options.why)
        _say(options, {"refused": f"models:/{name}/{number}"}, f"models:/{name}/{number} is refused")
        return
    _champion(options, name, number, promotion.approve(name, number, options.why))


def promote(options: argparse.Namespace) -> None:
    """Make a version the champion of its model by hand.

    Raises:
        InputError: if what was given is not `NAME/VERSION`, or the service of this store has another MLflow.
    """
    from lewis.registry import promotion
    from lewis_flows.service.servers import check_mlflow_as_served

    check_mlflow_as_served()
    name, number = _named(options.version)
    _champion(options, name, number, promotion.promote_by_hand(name, number, options.why))


def _named(version: str) -> tuple[str, str]:
    name, _, number = version.removeprefix("models:/").rpartition("/")
    if not name or not number.isdecimal():
        raise InputError(f"expected NAME/VERSION, for example my-merge/3, got {version!r}")
    return _model(name), str(int(number))


def _model(what: str) -> str:
    """Return the name of a registered model, without `models:/`; one with / or : is refused, not taken for another."""
    name = what.removeprefix("models:/")
    if "/" in name or ":" in name:
        raise InputError(f"expected the NAME of a registered model, for example my-merge, got {what!r}")
    return name


def _champion(options: argparse.Namespace, name: str, number: str, before: str) -> None:
    uri = f"models:/{name}/{number}"
    reported = _report(uri, options.why)
    text = f"{uri} is the champion" + (f" in place of {before}" if before else "")
    _say(options, {"champion": uri, "before": before or None}, text)
    _warn_of_targets(name, uri, reported)


def _say(options: argparse.Namespace, facts: dict[str, str | None], text: str) -> None:
    print(json.dumps(facts, indent=2) if options.json else text)


def rollback(options: argparse.Namespace) -> None:
    """Make the previous champion of a model the champion again.

    The version that is taken back is the given one, else that which is the champion when the command begins.

    Raises:
        InputError: if the service of this store has another MLflow than this environment names.
    """
    from lewis.registry import promotion
    from lewis_flows.service.servers import check_mlflow_as_served

    check_mlflow_as_served()
    what = options.what.removeprefix("models:/")
    name, _, number = what.rpartition("/")
    if not (name and number.isdecimal()):
        name, number = what, ""
    name = _model(name)
    number = number or promotion.champion_number(name) or ""
    champion = promotion.rollback(name, options.why, str(int(number)) if number else None)
    reported = _report(champion, options.why)
    before = f"{champion.rpartition('/')[0]}/{int(number)}"
    _say(options, {"champion": champion, "before": before}, f"{champion} is the champion again in place of {before}")
    _warn_of_targets(name, champion, reported)


def _warn_of_targets(name: str, champion: str, reported: bool) -> None:
    """Warn of targets that still serve another version, if no service runs that would update them."""
    from lewis.serving.records import served
    from lewis_flows.cli.terminal import say_error

    others = [] if reported else [each for each in served(name) if each.uri != champion]
    for each in others:
        has = each.uri or "nothing"
        say_error(f"{each.target} still has {has}: no service runs here; `lewis serve` of its recipe moves it")


def _report(version: str, why: str) -> bool:
    """Report the new champion to the Prefect server; return False if none runs: the next one gets the report later.

    Runs that wait for an answer about a version, and need none any more, go on or end; see `approval.settle`. If that
    fails, the next poll of the service does it.
    """
    import httpx

    from lewis_flows.cli.terminal import say_error
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import running

    if url := running():
        with connected(url):
            from lewis_flows import approval
            from lewis_tasks.support import moves

            try:
                approval.settle(version, why)
            except (LewisError, httpx.HTTPError) as error:
                say_error(f"runs may still wait for an answer that they need no more: {error}")
            moves.report()
    return bool(url)
