"""`lewis open`, `report`, `logs` and `cancel`: the runs of a recipe."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TextIO

from lewis.errors import LewisError
from lewis.redact import redacted
from lewis_flows.cli import completion
from lewis_flows.cli.arguments import flag, option

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, Log

    from lewis_flows.service.links import Links

_LOG_PAGE = 200  # lines that Prefect gives per request
_PAUSE = 1.0  # seconds between two looks of --follow

_RECIPE: dict[str, Any] = {"metavar": "RECIPE", "offer": completion.recipes_and_files}
KNOWN_RECIPE = option("recipe", **_RECIPE, help="name of a recipe in the recipes folder, or a file")
OPEN = (
    option("recipe", **_RECIPE, nargs="?", help="by default the pages of the service"),
    flag("--no-browser", "print the pages and open none"),
)
_PAGE = "a recipe, whose last run it is; id or name of a run; or a version, such as my-merge/3"
REPORT = (
    option("what", metavar="NAME", help=_PAGE, offer=completion.recipes),
    flag("--open", "open it in a browser"),
)
_WHAT = "name of a recipe, or name or id of a run"
CANCEL = option("what", metavar="RECIPE|RUN", help=_WHAT, offer=completion.recipes)
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOGS = (
    flag("--follow", "go on until the run ends, or waits for a person"),
    option("--level", choices=_LEVELS, default="INFO", help="the least level (INFO)"),
)


def open_links(options: argparse.Namespace) -> None:
    """Print the pages of the service, or of a recipe's last run and versions; in a terminal, open the first too."""
    from lewis_flows.service.links import Links, links, pages

    found = links(options.recipe) if options.recipe else pages()
    if options.json:
        print(redacted(found.model_dump_json(indent=2)))
        return
    rows = list(_rows(found)) if isinstance(found, Links) else list(found.pages.items())
    asked = [f"{name} asks for {what}" for name, what in found.sign_in.items()]
    rows += zip(["sign in", ""], asked, strict=False)
    width = max(len(name) for name, _ in rows)
    print("".join(f"{name:<{width}}  {redacted(text)}\n" for name, text in rows if text), end="")
    first = next((text for _, text in rows if text.startswith("http")), "")
    if first and sys.stdout.isatty() and not options.no_browser:
        from lewis_flows.service.sign_in import open_signed_in

        open_signed_in(first)


def _rows(found: "Links") -> Iterator[tuple[str, str]]:
    told = f"{found.state}: {found.message}" if found.message else found.state
    yield from (("run", told or "none yet"), ("", found.run), *found.artifacts.items())
    yield from (("version", found.version or "none yet"), ("", found.version_page))
    if found.champion != found.version:
        yield from (("champion", found.champion), ("", found.champion_page))
    yield "published", found.published


def report(options: argparse.Namespace) -> None:
    """Print the path of a run's page, and with `--open` open it in a browser."""
    import webbrowser

    from lewis_flows.run_page import find

    page = find(options.what)
    print(json.dumps({"page": str(page)}) if options.json else page)
    if options.open and not webbrowser.open(page.as_uri()):
        print("no browser was found here; copy the file to where there is one", file=sys.stderr)


def cancel(options: argparse.Namespace) -> int:
    """Cancel the runs of a recipe that go on or wait, or one run; the exit code is 1 if one has not ended in time."""
    from lewis_flows.service.cancel import cancel

    runs = cancel(options.what)
    if options.json:
        print(json.dumps([run.model_dump() for run in runs], indent=2))
    else:
        print("".join(f"{run.name}: {run.state}\n" for run in runs) or "nothing runs or waits\n", end="")
    return int(any(not run.ended for run in runs))


def logs(options: argparse.Namespace) -> None:
    """Print the log of the last run of a recipe; with `--json` as one JSON object per line."""
    from lewis_flows import recipes_folder
    from lewis_flows.service.links import last_run, server

    recipe = recipes_folder.name_of(str(recipes_folder.find(options.recipe)))
    with server() as (client, _):
        if (run := last_run(client, recipe)) is None:
            raise LewisError(f"{recipe}: Prefect knows no run of this recipe; `lewis run` starts one")
        level = logging.getLevelName(options.level)
        print_log(client, run.id, level, follow=options.follow, as_json=options.json, file=sys.stdout)


def print_log(
    client: "SyncPrefectClient", run: "UUID", level: int, *, follow: bool, as_json: bool, file: TextIO
) -> "FlowRun":
    """Print the log of a run.

    Args:
        client: of the server.
        run: id of the run.
        level: the least level of a line that is printed.
        follow: go on until the run ends, or waits for a person.
        as_json: print each line as a JSON object.
        file: where to print.

    Returns:
        the run as it was before the last lines were read.
    """
    seen, name_of = 0, cache(partial(_name_of_task, client))
    while True:
        found = client.read_flow_run(run)
        for line in _lines(client, run, level, seen):
            seen += 1
            _print(line, name_of(line.task_run_id), as_json=as_json, file=file)
        if not follow or found.state is None or found.state.is_final() or found.state.is_paused():
            return found
        time.sleep(_PAUSE)


def _lines(client: "SyncPrefectClient", run: Any, level: int, seen: int) -> Iterator["Log"]:
    """Yield the lines of a run's log after the first `seen`, oldest first."""
    from prefect.client.schemas.filters import LogFilter

    wanted = LogFilter.model_validate({"flow_run_id": {"any_": [run]}, "level": {"ge_": level}})
    while page := client.read_logs(wanted, limit=_LOG_PAGE, offset=seen):
        yield from page
        seen += len(page)


def _name_of_task(client: "SyncPrefectClient", task: "UUID | None") -> str:
    """The name of a task's run; empty without a task, or if Prefect does not know it (yet)."""
    from prefect.exceptions import ObjectNotFound

    with suppress(ObjectNotFound):
        return client.read_task_run(task).name if task else ""
    return ""


def _print(line: "Log", task: str, *, as_json: bool, file: TextIO) -> None:
    level, text = logging.getLevelName(line.level), line.message
    if as_json:
        facts = {"time": line.timestamp.isoformat(), "level": level, "logger": line.name, "task": task, "message": text}
        print(json.dumps(facts, ensure_ascii=False), file=file, flush=True)
    else:
        about = f"{task} | " if task and not text.startswith(task) else ""  # progress has its name already
        print(f"{line.timestamp.astimezone():%H:%M:%S} {level:<7} {about}{text}", file=file, flush=True)
