"""`lewis open` and `lewis logs`: where to look at a recipe's last run, and what it said."""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lewis.redact import redacted

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Log

_PAGE = 200  # lines that Prefect gives at once
_PAUSE = 1.0  # seconds between two looks of --follow


def known_recipe(command: argparse.ArgumentParser) -> None:
    """`RECIPE`, by name or path."""
    command.add_argument("recipe", metavar="RECIPE", help="name of a recipe in the folder of recipes, or a YAML file")


def open_links(options: argparse.Namespace) -> None:
    """Print the pages of a recipe's last run and of its versions."""
    from lewis_flows.service.links import links

    found = links(options.recipe)
    if options.json:
        print(found.model_dump_json(indent=2))
        return
    told = f"{found.state}: {found.message}" if found.message else found.state
    rows = [("run", told or "none yet"), ("", found.run), *(found.artifacts.items())]
    rows += [("version", found.version or "none yet"), ("", found.version_page)]
    rows += [("champion", found.champion), ("", found.champion_page)] if found.champion != found.version else []
    rows += [("published", found.published)]
    asked = [f"{name} asks for {what}" for name, what in found.sign_in.items()]
    rows += zip(["sign in", ""], asked, strict=False)
    width = max(len(name) for name, _ in rows)
    print("".join(f"{name:<{width}}  {redacted(text)}\n" for name, text in rows if text), end="")


def log_options(command: argparse.ArgumentParser) -> None:
    """`--follow` and `--level`."""
    command.add_argument("--follow", action="store_true", help="go on until the run ends")
    command.add_argument(
        "--level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO", help="the least level (INFO)"
    )


def logs(options: argparse.Namespace) -> None:
    """Print the log of the last run of a recipe; with `--json` an object a line."""
    from lewis_flows import recipes_folder
    from lewis_flows.service.links import run_of, server

    recipe = recipes_folder.name_of(str(recipes_folder.find(options.recipe)))
    with server() as (client, _):
        run, seen = run_of(client, recipe), 0
        while True:
            state = client.read_flow_run(run.id).state
            for line in _lines(client, run.id, logging.getLevelName(options.level), seen):
                seen += 1
                _print(line, as_json=options.json)
            if not options.follow or state is None or state.is_final():
                return
            time.sleep(_PAUSE)


def _lines(client: "SyncPrefectClient", run: Any, level: int, seen: int) -> Iterator["Log"]:
    """The lines of a run after the first `seen`, oldest first."""
    from prefect.client.schemas.filters import LogFilter

    wanted = LogFilter.model_validate({"flow_run_id": {"any_": [run]}, "level": {"ge_": level}})
    while page := client.read_logs(wanted, limit=_PAGE, offset=seen):
        yield from page
        seen += len(page)


def _print(line: "Log", *, as_json: bool) -> None:
    level = logging.getLevelName(line.level)
    if as_json:
        told = {"time": line.timestamp.isoformat(), "level": level, "logger": line.name, "message": line.message}
        print(json.dumps(told, ensure_ascii=False), flush=True)
    else:
        print(f"{line.timestamp.astimezone():%H:%M:%S} {level:<7} {line.message}", flush=True)
