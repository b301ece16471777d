"""The command line and its table of commands. Exit codes: 0 done, 2 the input is wrong, 1 it failed while running.

Modules of commands import the library, Prefect and MLflow inside their functions, so that the help appears immediately.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

from lewis import settings
from lewis.errors import InputError, LewisError
from lewis.redact import redacted
from lewis.store import writable
from lewis_flows import environment, json_logs
from lewis_flows.cli import compare, housekeeping, inspect, merge, registry, run, runs, service, terminal
from lewis_flows.cli.arguments import FORCE, JSON, JSON_FILE, NAME, PREFECT_FILE, RECIPE, WHY, Add
from lewis_flows.service import credentials


class Command(NamedTuple):
    """A command of the program `lewis`.

    Attributes:
        name: on the command line.
        run: executes the command, given the parsed arguments; returns the exit code, None is 0.
        arguments: functions that add arguments to the command's parser.
        words: for the help.
        writes: whether it needs a store that it can write to.
    """

    name: str
    run: Callable[[argparse.Namespace], int | None]
    arguments: tuple[Add, ...]
    words: str
    writes: bool = True


# fmt: off
COMMANDS = (
    Command("new", inspect.new, (*inspect.NEW, JSON),
            "write a recipe with comments, from a base and experts: calibration sets and tasks that fit"),
    Command("run", run.run, (*RECIPE, FORCE, JSON),
            "run the whole DAG: merge, score, register, promote"),
    Command("search", run.search, (*RECIPE, *run.LIMITS, JSON),
            "try the values of the recipe's `search` block, and register the best"),
    Command("serve", run.serve, (runs.KNOWN_RECIPE, run.AGAIN, JSON),
            "put the champion into service where the recipe's `serve` block says, as a promotion does"),
    Command("served", registry.served, (registry.SERVED, JSON),
            "print what is in service at each target, since when, and what a target did not take", writes=False),
    Command("plan", merge.plan, (*RECIPE, JSON),
            "tell what a run would do: inputs, cached steps, disk, memory, time, covered layers", writes=False),
    Command("inspect", inspect.inspect, (*RECIPE, *inspect.INSPECT, JSON),
            "tell whether the models belong together: findings, what they mean, what to do"),
    Command("merge", merge.merge, (*RECIPE, *merge.OUTPUT, FORCE, JSON),
            "merge with the library alone: no Prefect, no MLflow"),
    Command("importance", merge.importance, (*RECIPE, JSON_FILE, JSON),
            "measure the importance of every covered layer; for methods with densities"),
    Command("allocate", merge.allocate, (*RECIPE, JSON_FILE, JSON),
            "allocate a density to every tensor of every expert; draws FILE.png too; for methods with densities"),
    Command("export", merge.export, (*RECIPE, merge.EXPORT, JSON),
            "print a recipe as a mergekit config, with its LEWIS densities as filters; for methods that mergekit has"),
    Command("demo", run.demo, (JSON,),
            "train a family of tiny models and run the whole DAG on it"),
    Command("up", service.up, service.UP,
            "run the service until Ctrl-C: servers, deployments, worker, webhook receiver"),
    Command("status", service.status, (service.status_options, JSON),
            "tell what runs, what is due, what champions hold and what is newer", writes=False),
    Command("settings", service.print_settings, (JSON,),
            "print every environment variable that LEWIS reads: its value now, its default, what it does",
            writes=False),
    Command("env", service.print_environment, (JSON,),
            "print the exports with which other programs find the servers of this store, passwords included",
            writes=False),
    Command("open", runs.open_links, (*runs.OPEN, JSON),
            "print and open the pages of the service, or those of a recipe: last run, artifacts, version, champion",
            writes=False),
    Command("report", runs.report, (*runs.REPORT, JSON),
            "print the path of a run's page: scores, pictures, samples, lineage, what each step took"),
    Command("logs", runs.logs, (runs.KNOWN_RECIPE, *runs.LOGS, JSON),
            "print the log of a recipe's last run", writes=False),
    Command("cancel", runs.cancel, (runs.CANCEL, JSON),
            "cancel the runs of a recipe that go on or wait, or one run", writes=False),
    Command("gc", housekeeping.gc, (*housekeeping.GC, JSON),
            "remove what no registered version, no recent run and no running one needs"),
    Command("retention", housekeeping.retention, (*housekeeping.RETENTION, JSON),
            "remove old runs of Prefect and MLflow, and old entries of LEWIS_STORE, that nothing needs"),
    Command("backup", housekeeping.backup, (housekeeping.COPY, JSON),
            "copy what cannot be made again: the databases in the store, MLflow's files, recipes, secrets"),
    Command("restore", housekeeping.restore, (housekeeping.COPY, JSON),
            "put such a copy back into an empty store"),
    Command("verify", housekeeping.verify, (JSON,),
            "read everything in the store and in MLflow again, and tell what is damaged"),
    Command("compare", compare.compare, (*compare.MODELS, JSON),
            "compare two models, versions or results of lm-eval document by document: gain, interval, wins, losses, p",
            writes=False),
    Command("history", registry.history, (NAME, *registry.HISTORY, JSON),
            "tell who replaced whom as champion of a model, and why", writes=False),
    Command("pull", registry.pull, (*registry.PULL, JSON),
            "write a version of a registered model into a folder, its champion by default"),
    Command("approve", registry.approve, (registry.VERSION, registry.REFUSE, WHY, JSON),
            "let a version that passed its gate, and waits for a person, become the champion"),
    Command("promote", registry.promote, (registry.VERSION, WHY, JSON),
            "make a version the champion by hand"),
    Command("rollback", registry.rollback, (registry.BAD, WHY, JSON),
            "put the previous champion of a model back"),
    Command("deploy", service.deploy, (PREFECT_FILE, JSON),
            "put pool, limit, deployments and automations on a Prefect server"),
)
"""All commands, in the order of the help."""
# fmt: on


def program() -> NoReturn:
    """Run the program `lewis` with `main`, then end the process without the interpreter's own cleanup.

    The cleanup of what torch, Prefect and MLflow have created would take seconds. Functions of `atexit` still run.
    """
    status = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the reader of the output has ended
                stream.flush()
        os._exit(status)

    terminal.open_closed()
    terminal.show_controls()
    atexit.register(leave)  # the first that is registered is the last that runs
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line, without the program; by default those of this process.

    Returns:
        The exit code.
    """
    as_json = False
    try:
        parser = _parser()
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what can come next
            import argcomplete

            argcomplete.autocomplete(parser)
        options = parser.parse_args(arguments)
        as_json = json_logs.is_json()
        environment.prepare()
        credentials.find()
        if options.writes:
            settings.check()
            writable.check_store()
        code = options.run(options) or 0
        sys.stdout.flush()  # a reader that has ended raises here, not at exit
    except InputError as error:
        terminal.say_error(f"{error}", as_json=as_json)
        return 2
    except LewisError as error:
        terminal.say_error(f"it failed: {error}", as_json=as_json)
        return 1
    except KeyboardInterrupt as error:
        terminal.say_error(str(error) or terminal.STOPPED, as_json=as_json)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and terminal.nobody_reads():
            return terminal.SIGPIPE
        full = terminal.output_is_full(error)
        why = f"{error}; there is no room for the output" if full else redacted(writable.explained(error))
        terminal.say_error(f"it failed: {why}", as_json=as_json)
        return 1
    except Exception as error:
        if "KeyboardInterrupt" not in str(error):  # all that pydantic leaves of one, in an error of its own
            raise
        terminal.say_error(terminal.STOPPED, as_json=as_json)
        return 130
    return code


class _Version(argparse.Action):
    """The option `--version`, which looks the version up only when it is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"lewis {version('lewis-merge')}", flush=True)
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lewis", description="Keep a merged LLM up to date: merge, score, register and promote, as a Prefect DAG."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="tell the version of LEWIS and end")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        its = parsers.add_parser(command.name, help=command.words, description=command.words)
        its.set_defaults(run=command.run, writes=command.writes)
        for add in command.arguments:
            add(its)
    return parser


if __name__ == "__main__":
    program()
