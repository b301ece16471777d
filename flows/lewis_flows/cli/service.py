"""`lewis up`, `deploy`, `status`, `settings` and `env`: the service that keeps models up to date."""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lewis import settings
from lewis.errors import InputError
from lewis.redact import redacted
from lewis_flows import json_logs
from lewis_flows.cli import completion, terminal
from lewis_flows.cli.arguments import PREFECT_FILE, flag, option

_REFRESH = 5.0  # seconds between two looks of `status --watch`
_SERVE = "serve the champion of this recipe too, or of the only one: the OpenAI API on port 4400"
_FORMAT = "json: an object a line, for a collector of logs; by default LEWIS_LOG_FORMAT, else text"
UP = (
    option("--serve", metavar="RECIPE", nargs="?", const="", help=_SERVE, offer=completion.recipes),
    PREFECT_FILE,
    flag("--verbose", "print every line of every part, not only events"),
    option("--log-format", choices=("text", "json"), help=_FORMAT),
)


def up(options: argparse.Namespace) -> None:
    """Run the service until Ctrl-C or SIGTERM, and print what its parts say."""
    from lewis_flows.cli.up_output import Output
    from lewis_flows.service.servers import RECIPES
    from lewis_flows.service.up import up

    if options.log_format:
        os.environ[settings.LOG_FORMAT.name] = options.log_format  # the parts read it
        json_logs.prepare()
    output = Output(verbose=options.verbose, as_json=json_logs.is_json())

    def ready(urls: dict[str, str]) -> None:
        prefect = urls["prefect"].removesuffix("/api")
        named = {"Prefect": prefect, "Recipes": prefect + RECIPES, "MLflow": urls["mlflow"], "Webhook": urls["webhook"]}
        named |= {"Champion": f"{urls['champion']}/v1"} if "champion" in urls else {}
        for name, url in named.items():
            output.say("lewis", f"{name:<8} {redacted(url)}")
        output.say("lewis", "`lewis open` opens its pages and signs the browser in; Ctrl-C stops all of it")

    try:
        up(output.say, ready, options.prefect_file, options.serve)
    except KeyboardInterrupt:  # the usual way to stop it, no failure
        output.say("lewis", "stopped; its state is kept, and the next `lewis up` goes on with it")


def deploy(options: argparse.Namespace) -> None:
    """Put work pool, limit, deployments and automations on a Prefect server."""
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import prefect_server

    with prefect_server() as url, connected(url):
        from lewis_flows.service import deploy

        recipes = deploy.deploy(options.prefect_file or deploy.PREFECT_YAML)
    if options.json:
        print(json.dumps({"server": redacted(url), "recipes": recipes}, indent=2, ensure_ascii=False))
        return
    print(f"deployed to {redacted(url)}, nightly merges of: {', '.join(recipes) or 'nothing, there are no recipes'}")


def status_options(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `lewis status`: `RECIPE`, `--check`, `--watch` and `--html FILE`."""
    about = "only this recipe, with its last runs"
    option("recipe", metavar="RECIPE", nargs="?", help=about, offer=completion.recipes)(command)
    forms = command.add_mutually_exclusive_group()
    forms.add_argument(
        "--check", action="store_true",
        help="print only what is wrong, one line each; exit code 0: nothing, 10: a part of the service is down, 11: "
        "something could not be found out, 12: a recipe is broken, 13: the last run of a recipe failed, 14: a run is "
        "late, 15: a champion is behind, 16: a version waits for approval, 17: a champion is not in service, 18: there "
        "is no champion any more; of several, the smallest",
    )  # fmt: skip
    forms.add_argument("--watch", action="store_true", help="print it again every few seconds, until Ctrl-C")
    forms.add_argument("--html", metavar="FILE", type=Path, help="write one page of all recipes")


@contextmanager
def _no_news() -> Iterator[None]:
    """Suppress log messages about new commits: the printed status shows them, and stderr is for problems."""
    models = logging.getLogger("lewis.models")
    before = models.level
    models.setLevel(logging.WARNING)
    try:
        yield
    finally:
        models.setLevel(before)


@_no_news()
def status(options: argparse.Namespace) -> int:
    """Print the service's status; the exit code is 1 if a part of it is down, with `--check` that of its help."""
    from lewis import store
    from lewis.registry import tracking
    from lewis.store.writable import check_output_file
    from lewis_flows import recipes_folder
    from lewis_flows.service import credentials, note
    from lewis_flows.service.status import status
    from lewis_flows.service.status_data import problems
    from lewis_flows.service.status_text import as_text

    tracking.without_tables()
    if "mlflow_user" in (known := note.read()) and not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = known["mlflow"]  # a second faster than to open the database
        credentials.find()
    only = recipes_folder.name_of(str(recipes_folder.find(options.recipe))) if options.recipe else ""
    if options.watch:
        return _watch(lambda: as_text(status(only, scores=bool(only)), datetime.now(UTC), _width()))
    file = check_output_file(options.html, "--html") if options.html else None
    found = status(only, scores=bool(only or file))
    if file:
        from lewis_flows.service.recipes_page import as_html

        store.write_text(file, as_html(found, datetime.now(UTC)))
    if options.check:
        wrong = problems(found, datetime.now(UTC))
        if options.json:
            print(json.dumps([problem.model_dump() for problem in wrong], indent=2, ensure_ascii=False))
        else:
            print("".join(f"{problem.about}: {problem.text}\n" for problem in wrong) or "all is well\n", end="")
        return wrong[0].code if wrong else 0
    if options.json:
        print(found.model_dump_json(indent=2))
    else:
        print(f"{options.html}\n" if options.html else as_text(found, datetime.now(UTC), _width()), end="")
    return 0 if all(part.up for part in found.parts) else 1


def _width() -> int:
    return shutil.get_terminal_size((120, 40)).columns


def _watch(text: Callable[[], str]) -> int:
    """Show a text in the terminal, recomputed every few seconds until Ctrl-C."""
    if not sys.stdout.isatty():
        raise InputError("--watch: expected a terminal; leave it out, or repeat `lewis status --json` from a script")
    with suppress(KeyboardInterrupt):
        while True:
            shown = text()
            print(f"\x1b[2J\x1b[H{shown}", end="", flush=True)
            time.sleep(_REFRESH)
    return 0


def print_environment(options: argparse.Namespace) -> None:
    """Print what `mlflow`, `prefect` and programs that use them need in their environment, as a shell reads it."""
    from shlex import quote

    from lewis_flows.service.servers import client_environment

    found = client_environment()
    lines = [f"export {name}={quote(value)}" for name, value in found.items()]
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines))


def print_settings(options: argparse.Namespace) -> int:
    """Print every setting; the exit code is 2 if one has a wrong value."""
    rows, problems = [], []
    for each in settings.ALL:
        rows.append({"name": each.name, "value": each.shown(), "default": each.default, "what": each.what})
        try:
            each.get()
        except InputError as error:
            problems.append(str(error))
    unknown = list(settings.unknown())
    if options.json:
        facts = {"settings": rows, "unknown": unknown, "problems": problems}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        terminal.print_table(rows)
    for text in unknown + problems:
        terminal.say_error(text, as_json=json_logs.is_json())
    return 2 if problems else 0
