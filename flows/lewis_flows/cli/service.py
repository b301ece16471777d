"""`lewis up`, `deploy`, `status`, `settings`, `open` and `logs`: the service that keeps models up to date, its runs."""

import argparse
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from lewis import settings
from lewis.errors import InputError, LewisError
from lewis.redact import redacted
from lewis_flows import json_logs
from lewis_flows.cli import terminal


def up_output(command: argparse.ArgumentParser) -> None:
    """`--verbose` and `--log-format`."""
    command.add_argument("--verbose", action="store_true", help="print every line of every part, not only events")
    command.add_argument(
        "--log-format", choices=("text", "json"),
        help="json: an object a line, for a collector of logs; by default LEWIS_LOG_FORMAT, else text",
    )  # fmt: skip


def up(options: argparse.Namespace) -> None:
    """Run the service until Ctrl-C or SIGTERM, and print what its parts say."""
    from lewis_flows.cli.up_output import Output
    from lewis_flows.service.up import up

    if options.log_format:
        os.environ[settings.LOG_FORMAT.name] = options.log_format  # the parts print what is read here
        json_logs.prepare()
    output = Output(verbose=options.verbose, as_json=json_logs.is_json())

    def ready(urls: dict[str, str]) -> None:
        named = {"Prefect": urls["prefect"].removesuffix("/api"), "MLflow": urls["mlflow"], "Webhook": urls["webhook"]}
        for name, url in named.items():
            output.say("lewis", f"{name:<8} {redacted(url)}")
        output.say("lewis", "Ctrl-C stops all of it")

    try:
        up(output.say, ready, options.prefect_file)
    except KeyboardInterrupt:  # as one stops it: nothing has failed
        output.say("lewis", "stopped; its state is kept, and the next `lewis up` goes on with it")


def deploy(options: argparse.Namespace) -> None:
    """Bring a Prefect server up to date."""
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import prefect_server

    with prefect_server() as url, connected(url):
        from lewis_flows.service import deploy

        recipes = deploy.deploy(options.prefect_file or deploy.PREFECT_YAML)
    if options.json:
        print(json.dumps({"server": redacted(url), "recipes": recipes}, indent=2, ensure_ascii=False))
        return
    print(f"deployed to {redacted(url)}, nightly merges of: {', '.join(recipes) or 'nothing, there are no recipes'}")


def status_check(command: argparse.ArgumentParser) -> None:
    """`--check`."""
    command.add_argument(
        "--check", action="store_true",
        help="print only what is wrong, one line each; exit code 0: nothing, 10: a part of the service is down, 11: "
        "something could not be found out, 12: a recipe is broken, 13: the last run of a recipe failed, 14: a run is "
        "late; of several, the smallest",
    )  # fmt: skip


def status(options: argparse.Namespace) -> int:
    """Print the status; the exit code is 1 if a part of the service is down, and of `--check` as its help says."""
    from lewis_flows.service.status import status
    from lewis_flows.service.status_data import problems
    from lewis_flows.service.status_text import as_text

    found, width = status(), shutil.get_terminal_size((120, 40)).columns
    if options.check:
        wrong = problems(found)
        if options.json:
            print(json.dumps([problem.model_dump() for problem in wrong], indent=2, ensure_ascii=False))
        else:
            print("".join(f"{problem.about}: {problem.text}\n" for problem in wrong) or "all is well\n", end="")
        return wrong[0].code if wrong else 0
    print(found.model_dump_json(indent=2) if options.json else as_text(found, datetime.now(UTC), width), end="")
    return 0 if all(part.up for part in found.parts) else 1


if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Log

_LOG_PAGE = 200  # lines that Prefect gives at once
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
    from lewis_flows.service.links import last_run, server

    recipe = recipes_folder.name_of(str(recipes_folder.find(options.recipe)))
    with server() as (client, _):
        if (run := last_run(client, recipe)) is None:
            raise LewisError(f"{recipe}: Prefect knows no run of this recipe; `lewis run` starts one")
        seen, name_of = 0, cache(partial(_name_of_task, client))
        while True:
            state = client.read_flow_run(run.id).state
            for line in _lines(client, run.id, logging.getLevelName(options.level), seen):
                seen += 1
                _print(line, name_of(line.task_run_id), as_json=options.json)
            if not options.follow or state is None or state.is_final():
                return
            time.sleep(_PAUSE)


def _lines(client: "SyncPrefectClient", run: Any, level: int, seen: int) -> Iterator["Log"]:
    """The lines of a run after the first `seen`, oldest first."""
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


def _print(line: "Log", task: str, *, as_json: bool) -> None:
    level, text = logging.getLevelName(line.level), line.message
    if as_json:
        told = {"time": line.timestamp.isoformat(), "level": level, "logger": line.name, "task": task, "message": text}
        print(json.dumps(told, ensure_ascii=False), flush=True)
    else:
        about = f"{task} | " if task and not text.startswith(task) else ""  # progress begins with its task
        print(f"{line.timestamp.astimezone():%H:%M:%S} {level:<7} {about}{text}", flush=True)


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
