"""`lewis run`, `search`, `serve` and `demo`: the flows in this process, on a Prefect server; `run` also by a worker."""

import argparse
import importlib
import json
import os
import shlex
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from lewis import store
from lewis.quick_imports import quick_imports
from lewis.store import runs
from lewis_flows.cli import arguments, bars
from lewis_flows.cli.arguments import flag, option, positive
from lewis_flows.cli.terminal import STOPPED, print_table, say_error

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from lewis.recipe.recipe import Recipe
    from lewis_flows.merge import MergeReport
    from lewis_flows.search import SearchReport
    from lewis_flows.serve import ServeReport

LIMITS = (
    option("--trials", metavar="N", type=positive(int), help="how many in all, instead of the recipe's number"),
    option("--minutes", metavar="M", type=positive(float), help="begin no further trial after this time"),
)
AGAIN = flag("--again", "also where the champion is in service already")
_LIBRARIES = ("mlflow", "transformers.modeling_utils", "matplotlib.figure")
"""What a run uses at some time. To import these takes about as long as the server takes to start."""
_NEXT = {  # commands after the demo, and what each shows
    "lewis plan {recipe}": "what a second run would do: every step's result is in the store",
    "lewis report {version} --open": "scores, pictures and answers of this run, on one page",
    "lewis pull {version} -o merged": "the merged model as a folder",
    "lewis up": "the service: this run and this model on the pages of Prefect and MLflow",
}


def run(options: argparse.Namespace) -> None:
    """Run the DAG of a recipe: by the service, if that is up and the recipe is given by name, else in this process."""
    from lewis_flows.service.servers import running

    by_name = arguments.is_name(options.recipe)
    _load(options)
    if by_name and running():
        from lewis_flows.cli import started

        if ended := started.run(Path(options.recipe), options.overrides):
            _print_ended(ended, as_json=options.json)
            return
    run_merge(str(Path(options.recipe).absolute()), options.overrides, as_json=options.json)


def _print_ended(ended: "FlowRun", *, as_json: bool) -> None:
    """Print the report of a run of a deployment, or the run's state if there is no report."""
    from lewis_flows.registration import MergeReport

    if report := MergeReport.saved(str(ended.id)):
        _print_report(report, as_json=as_json)
        return
    facts = {"run": ended.name, "state": ended.state_name, "message": (ended.state and ended.state.message) or ""}
    print(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else ": ".join(filter(None, facts.values())))


def _print_report(report: "MergeReport", *, as_json: bool) -> None:
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_merge(report)


def _load(options: argparse.Namespace) -> "Recipe":
    """Load the recipe of a run, so that mistakes in it are found before a server is started."""
    from lewis_flows import recipes_folder

    recipe = arguments.load(options)
    recipes_folder.check_alone(Path(options.recipe), recipe)
    return recipe


def run_merge(recipe: str, overrides: Sequence[str], *, as_json: bool) -> "MergeReport":
    """Run the flow `merge` on the path of a recipe, print its report, as text or JSON, and return it."""
    report: MergeReport = _run_flow("merge", recipe, list(overrides), as_json=as_json)
    _print_report(report, as_json=as_json)
    return report


def search(options: argparse.Namespace) -> None:
    """Run the search of a recipe, and print its report."""
    from lewis.search import space, study

    recipe = _load(options)
    study.objectives_of(recipe)
    space.check(recipe)
    given = str(Path(options.recipe).absolute()), options.overrides, options.trials, options.minutes
    report: SearchReport = _run_flow("search", *given, as_json=options.json)
    if options.json:
        print(report.model_dump_json(indent=2))
        return
    print(f"{len(report.trials)} trials; the best, next to the recipe as it is, on documents that no trial saw:")
    print_table(report.confirmed)
    for override in report.overrides:
        print(f"  --set {override}")
    print(f"MLflow run of the search: {report.mlflow_run}")
    if report.merge:
        print_merge(report.merge)


def serve(options: argparse.Namespace) -> None:
    """Put the champion into service at the targets of a recipe."""
    from lewis_flows import recipes_folder

    given = str(recipes_folder.find(options.recipe)), options.again
    report: ServeReport = _run_flow("serve", *given, as_json=options.json)
    if options.json:
        print(report.model_dump_json(indent=2))
        return
    for each in report.served:
        what = "is in service now" if each["target"] in report.changed else "was in service already"
        print(f"{each['target']}: {each['uri']} {what}, as {each['alias']}")
    if report.outdated:
        print(f"{report.version} is not the champion any more: run the command again, which serves the new one")
    if not report.version:
        print("there is no champion to serve yet")


def print_merge(report: "MergeReport") -> None:
    """Print the report of a merge as text."""
    from lewis.reports.run_report import approve_command

    print_table(report.scores)
    print_table(report.comparison)
    if report.kept:
        print("what is kept of each expert's gain over the base, on its own task:")
        print_table(report.kept)
    for expert, mean in report.mean_density.items():
        print(f"mean density of {expert}: {mean:.3f}")
    print(f"merged model: {report.folder}")
    for sentence in filter(None, (report.adapter, report.fit)):
        print(sentence)
    if report.version:
        print(f"MLflow: {report.version} ({'new' if report.created else 'registered before'})")
        waits = f"passed, waits for: {approve_command(report.version)} --why ..."
        print(f"verdict: {'champion' if report.promoted else waits if report.waits else 'not promoted'}")
        print("\n".join(f"  {reason}" for reason in report.verdict))
    if report.published:
        print(f"published: {report.published}")
    if report.page:
        print(f"report of the run: {report.page}; `lewis report {shlex.quote(report.recipe)} --open` shows it")


def _run_flow(name: str, *arguments: object, as_json: bool) -> Any:
    """Run the flow `name` on the running Prefect server, or on one that is started for it; return the flow's result.

    If the started server dies, or the server stays away for too long, this process exits immediately with code 1.

    Raises:
        InputError: if the `lewis up` of this store has another MLflow than this environment.
    """
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import (
        check_mlflow_as_served,
        prefect_database,
        prefect_port,
        prefect_server,
        running,
    )

    check_mlflow_as_served()

    def leave(reason: str) -> NoReturn:
        say_error(f"it failed: {reason}; finished steps are kept, run the same command to go on", as_json=as_json)
        os._exit(1)  # its children end too; the next run marks this one as Crashed

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        say_error(STOPPED, as_json=as_json)
        os._exit(130)  # an exception in the middle of an import may end in another one, with a traceback

    def load(url: str, *libraries: str) -> None:
        signal.signal(signal.SIGINT, stop)
        with connected(url), quick_imports():
            for module in (f"lewis_flows.{name}", *libraries):
                importlib.import_module(module)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    alone = not running()
    with ExitStack() as stack:
        url = stack.enter_context(prefect_server(leave, meanwhile=lambda url: load(url, *_LIBRARIES)))
        load(url)
        stack.enter_context(connected(url))
        from prefect import tags
        from prefect.logging.handlers import APILogWorker

        from lewis_flows.turn import crash_dead_runs
        from lewis_tasks.support import flow_run, moves, patience

        flow = getattr(importlib.import_module(f"lewis_flows.{name}"), f"{name}_flow")
        flow_run.later = f"http://127.0.0.1:{prefect_port()}" if alone else ""
        database = prefect_database()
        crash_dead_runs(alone=alone and isinstance(database, Path) and store.holds(database))
        signal.signal(signal.SIGINT, _stop_tasks)
        try:
            with runs.noted(runs.COMMAND), tags("lewis"), patience.patient(leave):  # a wrong address has failed above
                return flow_run.result_of_run(flow(*arguments, return_state=True))
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            APILogWorker.drain_all(timeout=10)  # send the log before the server is stopped
            moves.report(patience=10)


def _stop_tasks(number: int, frame: FrameType | None) -> NoReturn:
    from lewis_tasks.support.caching import STOPPING

    STOPPING.set()
    raise KeyboardInterrupt


def demo(options: argparse.Namespace) -> None:
    """Train the family of tiny models in the store, then run its recipe."""
    from lewis.demo.family import make_family

    if not options.json:
        print("a tiny base and three experts are trained, merged, scored and registered: 2 to 6 minutes on two cores")
    with bars.progress() as report:
        folder = make_family(store.home() / "demo", lambda what, part: report(what, int(1000 * part), 1000))
    ended = run_merge(str(folder / "demo.yaml"), [], as_json=options.json)
    if not options.json:
        version = (ended.version or "").removeprefix("models:/")
        names = {"recipe": shlex.quote(str(folder / "demo.yaml")), "version": version}
        commands = {command.format(**names): what for command, what in _NEXT.items()}
        width = max(map(len, commands))
        print("\nThe recipe is {recipe}. To try next:".format(**names))
        print(*(f"  {command:<{width}}   {what}" for command, what in commands.items()), sep="\n")
