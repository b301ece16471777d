"""The command line. Exit codes: 0 done, 2 the input is wrong, 1 it failed while running."""

import argparse
import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_flows.cli import bars

if TYPE_CHECKING:
    from lewis.recipe.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what it did is the exit code."""
    options = _parser().parse_args(arguments)
    from lewis.errors import InputError, LewisError
    from lewis_flows import environment

    environment.prepare()
    try:
        options.command(options)
    except InputError as error:
        print(f"lewis: {error}", file=sys.stderr)
        return 2
    except LewisError as error:
        print(f"lewis: it failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lewis: stopped; finished steps are kept, run the same command to go on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"lewis: it failed: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lewis", description="Keep a merged LLM up to date: merge, score, register and promote, as a Prefect DAG."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], None], words: str, *, recipe: bool = True) -> Any:
        command = commands.add_parser(name, help=words, description=words)
        command.set_defaults(command=function)
        if recipe:
            command.add_argument("recipe", metavar="RECIPE", help="YAML file")
            command.add_argument(
                "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
                help="override a key of the recipe, for example lewis.density.max=0.7; may be repeated",
            )  # fmt: skip
        return command

    json_help = "print JSON instead of text"
    run = add("run", _run, "run the whole DAG: merge, score, register, promote")
    run.add_argument("--json", action="store_true", help=json_help)
    study = add("search", _search, "try the values of the recipe's `search` block, and register the best")
    study.add_argument(
        "--trials", metavar="N", type=_positive(int), help="how many in all, instead of the recipe's number"
    )
    study.add_argument("--minutes", metavar="M", type=_positive(float), help="begin no further trial after this time")
    study.add_argument("--json", action="store_true", help=json_help)
    plan = add("plan", _plan, "tell what a run would do: inputs, cached steps, disk, memory, time, covered layers")
    plan.add_argument("--json", action="store_true", help=json_help)
    merge = add("merge", _merge, "merge with the library alone: no Prefect, no MLflow")
    merge.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder of the merged model")
    merge.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="largest file to write, default 5GB")
    merge.add_argument("--json", action="store_true", help=json_help)
    importance = add("importance", _importance, "measure the importance of every covered layer")
    importance.add_argument("-o", "--output", metavar="FILE.json", type=Path, required=True)
    allocate = add("allocate", _allocate, "allocate a density to every tensor of every expert; draws FILE.png too")
    allocate.add_argument("-o", "--output", metavar="FILE.json", type=Path, required=True)
    add("export", _export, "print a mergekit config with the LEWIS densities as filters")
    demo = add("demo", _demo, "train a family of tiny models and run the whole DAG on it", recipe=False)
    demo.add_argument("--json", action="store_true", help=json_help)
    up = add("up", _up, "run the service until Ctrl-C: servers, deployments, worker, webhook receiver", recipe=False)
    state = add("status", _status, "tell what runs, what is due, what champions hold and what is newer", recipe=False)
    state.add_argument("--json", action="store_true", help=json_help)
    gc = add("gc", _gc, "remove what no registered version, no recent run and no running one needs", recipe=False)
    gc.add_argument("--days", metavar="N", type=float, default=14.0, help="keep what was used in the last N days (14)")
    gc.add_argument("--yes", action="store_true", help="remove it; without this, only show it")
    gc.add_argument("--json", action="store_true", help=json_help)
    told = add("history", _history, "tell who replaced whom as champion of a model, and why", recipe=False)
    told.add_argument("name", metavar="NAME", help="registered model")
    told.add_argument("--json", action="store_true", help=json_help)
    by_hand = add("promote", _promote, "make a version the champion by hand", recipe=False)
    by_hand.add_argument("version", metavar="NAME/VERSION")
    back = add("rollback", _rollback, "put the previous champion of a model back", recipe=False)
    back.add_argument("name", metavar="NAME", help="registered model")
    for command in (by_hand, back):
        command.add_argument("--why", metavar="TEXT", required=True, help="for the history")
    deploy = add("deploy", _deploy, "put pool, limit, deployments and automations on a Prefect server", recipe=False)
    for command in (up, deploy):
        command.add_argument("--prefect-file", metavar="FILE", type=Path, help="default: deployments/prefect.yaml")
    return parser


class _Terminal(logging.Handler):
    """Writes to what `sys.stderr` is now: while there is a bar, it goes above it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        with suppress(ValueError):
            if (value := kind(text)) > 0:
                return value
        raise argparse.ArgumentTypeError(f"expected a {'whole ' if kind is int else ''}number above 0, got {text!r}")

    return number


def _log_to_terminal() -> None:
    """For the commands without Prefect, which has handlers of its own."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Terminal()])
    logging.getLogger("lewis").setLevel(logging.INFO)


def _load(options: argparse.Namespace) -> "Recipe":
    from lewis.recipe.recipe import Recipe

    return Recipe.load(options.recipe, options.overrides)


def _run(options: argparse.Namespace) -> None:
    _load(options)  # a wrong recipe should not cost the start of a server
    _run_flow(str(Path(options.recipe).resolve()), options.overrides, as_json=options.json)


def _demo(options: argparse.Namespace) -> None:
    from lewis import store
    from lewis.demo.family import make_family

    with bars.progress() as report:
        folder = make_family(store.home() / "demo", lambda what, part: report(what, int(1000 * part), 1000))
    _run_flow(str(folder / "demo.yaml"), [], as_json=options.json)


def _up(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    from lewis_flows.service.up import up

    console, colours = Console(), {"lewis": "bold", "prefect": "blue", "mlflow": "cyan", "worker": "green"}

    def say(part: str, line: str) -> None:
        console.print(Text(f"{part:<8}", colours.get(part, "magenta")), Text.from_ansi(line), soft_wrap=True)

    def ready(urls: dict[str, str]) -> None:
        named = {"Prefect": urls["prefect"].removesuffix("/api"), "MLflow": urls["mlflow"], "Webhook": urls["webhook"]}
        print("\n".join(f"{name:<8} {url}" for name, url in named.items()) + "\nCtrl-C stops all of it", flush=True)

    up(say, ready, options.prefect_file)


def _deploy(options: argparse.Namespace) -> None:
    from lewis_flows.service.servers import prefect_server

    with prefect_server() as url:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}):
            from lewis_flows.service import deploy

            recipes = deploy.deploy(options.prefect_file or deploy.PREFECT_YAML)
    print(f"deployed to {url}, nightly merges of: {', '.join(recipes) or 'nothing, there are no recipes'}")


def _status(options: argparse.Namespace) -> None:
    from lewis_flows.service.status import status
    from lewis_flows.service.status_text import as_text

    found, width = status(), shutil.get_terminal_size((120, 40)).columns
    print(found.model_dump_json(indent=2) if options.json else as_text(found, datetime.now(UTC), width), end="")


def _gc(options: argparse.Namespace) -> None:
    from lewis.store import housekeeping
    from lewis_flows import turn

    _log_to_terminal()
    found = housekeeping.survey(options.days, active_since=turn.active_since())
    freed, total = housekeeping.remove(found) if options.yes else 0, sum(item.bytes for item in found)
    if options.json:
        facts = {"found": [asdict(item) for item in found], "bytes": total, "removed": options.yes, "freed": freed}
        print(json.dumps(facts, indent=2, default=str))
        return
    for item in found:
        print(f"{item.bytes / 1e6:10.3f} MB  {item.path}: {item.why}")
    done = f"{freed / 1e9:.3f} GB freed" if options.yes else f"{total / 1e9:.3f} GB; `lewis gc --yes` removes them"
    print(f"{len(found)} entries, {done}" if found else "nothing to remove")


def _search(options: argparse.Namespace) -> None:
    from lewis.search import study

    recipe = _load(options)  # a wrong recipe should not cost the start of a server
    study.objectives_of(recipe)
    study.check_space(recipe)

    def flow() -> Any:
        from lewis_flows.search import search_flow

        path = str(Path(options.recipe).resolve())
        return search_flow(path, options.overrides, options.trials, options.minutes)

    report = _with_prefect(flow)
    if options.json:
        print(report.model_dump_json(indent=2))
        return
    print(f"{len(report.trials)} trials; the best, beside the recipe as it is, on documents that no trial saw:")
    _print_table(report.confirmed)
    for override in report.overrides:
        print(f"  --set {override}")
    print(f"MLflow run of the search: {report.mlflow_run}")
    if report.merge:
        _print_merge(report.merge)


def _with_prefect(flow: Callable[[], Any]) -> Any:
    """Run a flow on the server that there is, or on one for as long as it takes."""
    from lewis_flows.service.servers import prefect_server

    with prefect_server() as url:
        from prefect.logging.handlers import APILogWorker
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}):
            from prefect import tags

            from lewis_flows.turn import crash_dead_runs

            crash_dead_runs()
            signal.signal(signal.SIGINT, _stop_tasks)
            try:
                with tags("lewis"):
                    return flow()
            finally:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                APILogWorker.drain_all(timeout=10)  # before the server goes


def _history(options: argparse.Namespace) -> None:
    from lewis.registry import history

    records = history.history(options.name)
    if options.json:
        print(json.dumps([asdict(each) for each in records], indent=2, ensure_ascii=False))
    else:
        _print_table(history.rows(records))


def _promote(options: argparse.Namespace) -> None:
    from lewis.errors import InputError
    from lewis.registry import promotion

    name, _, version = options.version.removeprefix("models:/").rpartition("/")
    if not name or not version.isdecimal():
        raise InputError(f"expected NAME/VERSION, for example my-merge/3, got {options.version!r}")
    before = promotion.promote_by_hand(name, version, options.why)
    print(f"models:/{name}/{version} is the champion" + (f" in place of {before}" if before else ""))


def _rollback(options: argparse.Namespace) -> None:
    from lewis.registry import promotion

    print(f"{promotion.rollback(options.name, options.why)} is the champion again")


def _run_flow(recipe: str, overrides: list[str], *, as_json: bool) -> None:
    def flow() -> Any:
        from lewis_flows.merge import merge_flow

        return merge_flow(recipe, overrides)

    report = _with_prefect(flow)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        _print_merge(report)


def _print_merge(report: Any) -> None:
    _print_table(report.scores)
    _print_table(report.comparison)
    for expert, mean in report.mean_density.items():
        print(f"mean density of {expert}: {mean:.3f}")
    print(f"merged model: {report.folder}")
    if report.version:
        print(f"MLflow: {report.version} ({'new' if report.created else 'registered before'})")
        print(f"verdict: {'champion' if report.promoted else 'not promoted'}")
        print("\n".join(f"  {reason}" for reason in report.verdict))
    if report.published:
        print(f"published: {report.published}")


def _stop_tasks(number: int, frame: Any) -> None:
    from lewis_tasks.support.caching import STOPPING

    STOPPING.set()
    raise KeyboardInterrupt


def _plan(options: argparse.Namespace) -> None:
    from lewis.plan import make_plan

    plan = make_plan(_load(options))
    print(json.dumps(plan.to_json(), indent=2) if options.json else plan.to_text())


def _merge(options: argparse.Namespace) -> None:
    from lewis import pipeline, store
    from lewis.devices import default_device
    from lewis.models.writer import parse_size
    from lewis.registry.registration import lineage_of, model_card
    from lewis.reports import card, pictures

    recipe, shard = _load(options), parse_size(options.max_shard_size)
    _log_to_terminal()
    store.check_replaceable(options.output)
    base, experts = _fetch(recipe)
    pipeline.prepare_merge(recipe, base, experts)  # whatever does not fit is told before the long part
    allocated = None
    if recipe.lewis and base:
        pipeline.layers_of(base)
        with bars.progress() as shown:
            _, allocated = pipeline.guide(recipe, base, experts, device=default_device(), progress=shown)
    prepared = pipeline.prepare_merge(recipe, base, experts, allocated)
    effort = bars.run_merge(
        prepared,
        options.output.resolve(),
        max_shard_size=shard,
        manifest=pipeline.lineage(recipe, base, experts, allocated),
    )
    means = allocated.means if allocated else {}
    told = model_card(recipe, base, experts, lineage_of(base, experts, ()), means)
    card.write(options.output.resolve(), told, pictures.densities(allocated) if allocated else None)
    if options.json:
        facts = {"folder": str(options.output.resolve()), "digest": prepared.digest, "bytes": prepared.size}
        print(json.dumps({**facts, **effort.to_json(), "mean_density": means}, indent=2))
    else:
        size = f"{len(prepared.layout)} tensors, {prepared.size / 1e9:.2f} GB"
        print(f"{options.output}: {size}, digest {prepared.digest}\n{effort.to_text()}")


def _guide(options: argparse.Namespace) -> Any:
    from lewis import pipeline
    from lewis.devices import default_device
    from lewis.errors import RecipeError

    recipe = _load(options)
    if recipe.lewis is None or recipe.base_model is None:
        raise RecipeError("lewis: missing; there is nothing to measure or allocate without this block")
    _log_to_terminal()
    base, experts = _fetch(recipe)
    assert base is not None
    pipeline.prepare_merge(recipe, base, experts)  # whatever does not fit is told before the long part
    parameters = sum(info.elements for info in base.open().tensors.values())
    layers = [layer for layer in pipeline.layers_of(base) if not recipe.excludes(layer.tensor)]
    passes = set[str]()
    with bars.progress() as report:

        def noted(what: str, done: int, total: int) -> None:
            passes.add(what)
            report(what, done, total)

        measured, allocated = pipeline.guide(recipe, base, experts, device=default_device(), progress=noted)
    return layers, parameters, measured, allocated, len(passes)


def _check_file(path: Path) -> None:
    """What cannot be written is told before the long part."""
    from lewis.errors import InputError

    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not above.is_dir() or path.suffix == ".png":
        raise InputError(f"-o {path}: expected the name of a JSON file in a folder")


def _importance(options: argparse.Namespace) -> None:
    from lewis import store
    from lewis.reports import tables

    _check_file(options.output)
    layers, parameters, measured, allocated, passes = _guide(options)
    rows = [{"model": entry.ref, "calibration": entry.calibration, "norms": entry.norms} for entry in measured]
    store.write_json(options.output, {"importance": rows})
    for entry in measured:
        print(f"importance of {entry.ref} on {entry.calibration}\n{tables.grid(layers, entry.norms, '.4g')}\n")
    for ref, each in allocated.experts().items():
        print(tables.allocation_text(ref, layers, each, parameters), end="\n\n")
    print(f"{options.output}: {len(rows)} measurements; passes run now: {passes}")


def _allocate(options: argparse.Namespace) -> None:
    from lewis import store
    from lewis.reports import pictures, tables

    _check_file(options.output)
    layers, parameters, _, allocated, _ = _guide(options)
    experts = {ref: each.to_json() for ref, each in allocated.experts().items()}
    store.write_json(options.output, {"experts": experts})
    store.write_bytes(options.output.with_suffix(".png"), pictures.densities(allocated))
    for ref, each in allocated.experts().items():
        print(tables.allocation_text(ref, layers, each, parameters), end="\n\n")


def _export(options: argparse.Namespace) -> None:
    from lewis import pipeline
    from lewis.merge.export import check_exportable, to_mergekit

    recipe = _load(options)
    check_exportable(recipe)  # before anything is measured
    base, experts = pipeline.pin_all(recipe)
    allocations = _guide(options)[3].experts() if recipe.lewis else {}
    print(to_mergekit(recipe, base, experts, allocations), end="")


def _fetch(recipe: "Recipe") -> Any:
    from lewis import pipeline

    base, experts = pipeline.pin_all(recipe)
    pipeline.preflight(recipe, base, experts)
    return pipeline.download(base) if base else None, [pipeline.download(source) for source in experts]


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 132
    # One table per metric, whose name would take half of the width.
    for metric in dict.fromkeys(row.get("metric", "") for row in rows):
        table = Table(title=metric or None, title_justify="left", box=box.SIMPLE_HEAD)
        shown = [{k: v for k, v in row.items() if k != "metric"} for row in rows if row.get("metric", "") == metric]
        for name in shown[0]:
            table.add_column(name, overflow="fold")
        for row in shown:
            table.add_row(*(str(value) for value in row.values()))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
