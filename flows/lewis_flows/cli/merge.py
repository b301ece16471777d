"""`lewis plan`, `merge`, `importance`, `allocate` and `export`: the library alone, without Prefect and MLflow."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lewis.errors import InputError, RecipeError
from lewis.settings import size_text
from lewis_flows.cli import arguments, bars
from lewis_flows.cli.arguments import option
from lewis_flows.cli.terminal import output_is_file, show_log

if TYPE_CHECKING:
    from lewis.allocation.step import AllocationEntry
    from lewis.importance.step import ImportanceEntry
    from lewis.models.network.module_tree import Layer
    from lewis.recipe.recipe import Recipe

OUTPUT = (
    option("-o", "--output", metavar="DIR", type=Path, required=True, help="folder of the merged model"),
    option("--max-shard-size", metavar="SIZE", default="5GB", help="largest file to write, default 5GB"),
)
_FILE = "file to write; a shell's `>` leaves an empty one if the recipe is refused"
EXPORT = option("-o", "--output", metavar="FILE.yaml", type=Path, help=_FILE)
_FOR = (
    "`importance` and `allocate` are for methods with densities, such as ties, and a `lewis` block; for any recipe "
    "`lewis inspect --plot FILE.png` shows where the experts moved"
)


def plan(options: argparse.Namespace) -> None:
    """Print the plan of a recipe: what a run would do."""
    from lewis.steps.plan import make_plan

    made = make_plan(arguments.load(options))
    print(json.dumps(made.to_json(), indent=2) if options.json else made.to_text())


def merge(options: argparse.Namespace) -> None:
    """Write a merged model or adapter, with its card, into a folder; one for each recipe of the file."""
    from lewis.merging.engine.load_loops import load_loops
    from lewis.models.files.writer import parse_size
    from lewis.recipe.documents import load_documents
    from lewis.recipe.schema import Inspect
    from lewis.store.runs import noted
    from lewis.store.writable import check_output_folder

    documents = load_documents(arguments.recipe_file(options), options.output)
    if documents and options.overrides:
        raise InputError(
            f"--set {options.overrides[0]}: the file holds {len(documents)} recipes; change it in the file"
        )
    forced = {"inspect": Inspect(on="warn")} if options.force else {}
    jobs = [(each.recipe.model_copy(update=forced), options.output / each.name) for each in documents]
    jobs = jobs or [(arguments.load(options), options.output)]
    shard, folders = parse_size(options.max_shard_size), [check_output_folder(folder) for _, folder in jobs]
    show_log()
    load_loops()
    told = []
    for (recipe, shown), folder in zip(jobs, folders, strict=True):
        with noted():
            facts, text = _merge_one(recipe, folder, shard, again=not documents)
        told.append(facts)
        if not options.json:
            print(f"{shown}: {text}")
    if options.json:
        print(json.dumps(told if documents else told[0], indent=2))


def _merge_one(recipe: "Recipe", folder: Path, shard: int, *, again: bool) -> tuple[dict[str, Any], str]:
    """Merge one recipe into a folder, `again` even if the folder has this merge; return facts as JSON data and text."""
    from lewis import library, store

    with bars.progress() as shown:
        given, prepared = library.prepare(recipe, shown)
    if not again and (store.read_manifest(folder) or {}).get("digest") == prepared.digest:
        return {"folder": str(folder), "digest": prepared.digest}, f"there already, digest {prepared.digest}"
    written, effort = bars.run_merge(
        prepared, folder, max_shard_size=shard, manifest=given.lineage(), unchanged=given.check_unchanged
    )
    made = library.with_card(recipe, given, written)
    facts = {"folder": str(folder), "digest": made.digest, "bytes": made.size, **effort.to_json()}
    facts |= {key: made.manifest[key] for key in ("adapter", "ridge", "held_back") if key in made.manifest}
    size = f"{len(prepared.layout)} tensors, {size_text(made.size)}"
    if made.adapter:
        size = f"{made.adapter.to_text()}; {size_text(made.size)}"
    text = "\n".join(filter(None, [f"{size}, digest {made.digest}", made.fit, effort.to_text()]))
    return {**facts, "mean_density": made.mean_density}, text


def importance(options: argparse.Namespace) -> None:
    """Write the importance of every layer as JSON, and print it with the densities."""
    from lewis import store
    from lewis.reports import tables

    file = _json_file(options)
    found = _allocate(options)
    rows = [{"model": each.ref, "calibration": each.calibration, "norms": each.norms} for each in found.measured]
    store.write_json(file, {"importance": rows})
    if options.json:
        print(json.dumps({"file": str(file), "measurements": len(rows), "passes": found.passes}, indent=2))
        return
    for each in found.measured:
        print(f"importance of {each.ref} on {each.calibration}\n{tables.grid(found.layers, each.norms, '.4g')}\n")
    _print_densities(found)
    print(f"{options.output}: {len(rows)} measurements; passes run now: {found.passes}")


def allocate(options: argparse.Namespace) -> None:
    """Write the densities as JSON and as a picture, and print them."""
    from lewis import store
    from lewis.reports import charts
    from lewis.store.writable import check_output_file

    file = _json_file(options)
    picture = check_output_file(file.with_suffix(".png"))
    found = _allocate(options)
    experts = {ref: each.to_json() for ref, each in found.allocated.experts().items()}
    store.write_json(file, {"experts": experts})
    store.write_bytes(picture, charts.densities(found.allocated))
    if options.json:
        facts = {"file": str(file), "picture": str(picture), "mean_density": dict(found.allocated.means)}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    _print_densities(found)


def export(options: argparse.Namespace) -> None:
    """Print a recipe as a mergekit config, or write it into a file."""
    import yaml

    from lewis import store

    try:
        file = arguments.output_file(options, options.output) if options.output else None
        made = _exported(options)
    except InputError as error:
        if options.output is None and output_is_file():  # the shell made the file before this program began
            raise InputError(
                f"{error}\nnothing was written into the file of `>`; `-o FILE.yaml` leaves none"
            ) from error
        raise
    text = json.dumps(yaml.safe_load(made), indent=2) + "\n" if options.json else made
    if file:
        store.write_text(file, text)
    else:
        print(text, end="")


def _exported(options: argparse.Namespace) -> str:
    from lewis.merging.export import check_exportable, to_mergekit
    from lewis.models.source import pin_all

    recipe = arguments.load(options)
    check_exportable(recipe.config, recipe.lewis)  # before anything is measured
    base, experts = pin_all(recipe)
    allocations = _allocate(options).allocated.experts() if recipe.allocator else {}
    return to_mergekit(recipe.text, recipe.config, recipe.lewis, base, experts, allocations)


class _Allocated(NamedTuple):
    """The measured importance and allocated densities of a recipe.

    Attributes:
        layers: the covered layers of the base that the recipe does not exclude.
        result: the layers of the merged model, which the recipe's slices make of `layers`.
        parameters: number of parameters of the base.
        measured: importance of base and experts.
        allocated: the densities.
        passes: how many forward passes ran now; the store had the others.
    """

    layers: "list[Layer]"
    result: "list[Layer]"
    parameters: int
    measured: "list[ImportanceEntry]"
    allocated: "AllocationEntry"
    passes: int


def _allocate(options: argparse.Namespace) -> _Allocated:
    """Measure importance and allocate densities; RecipeError without `lewis` block, base, or method with densities."""
    from lewis.allocation.step import layers_of_result
    from lewis.devices import default_device
    from lewis.importance.step import covered_layers
    from lewis.steps.graph import graph
    from lewis.steps.run import begin, run
    from lewis.steps.table import ALLOCATE, DOWNLOAD, MEASURE
    from lewis.store.runs import noted

    recipe = arguments.load(options)
    if recipe.fits and recipe.allocator is None:
        raise RecipeError(f"merge_method: {recipe.merge_method} fits to rows and takes no densities; {_FOR}")
    if recipe.lewis is None or recipe.base_model is None:
        lacks = "`lewis` block" if recipe.lewis is None else "base_model"
        raise RecipeError(f"the recipe has no {lacks}; {_FOR}")
    show_log()
    walked = graph(recipe)
    passes = set[str]()
    with bars.progress() as report, noted():

        def seen(what: str, done: int, total: int) -> None:
            passes.add(what)
            report(what, done, total)

        results = run(walked, ALLOCATE.name, known=begin(recipe), report=seen, device=default_device())
    base = results[f"{DOWNLOAD.name} {recipe.base_model}"]
    parameters = sum(info.elements for info in base.open().tensors.values())
    covered, _ = covered_layers(base, measured=recipe.runs_models)
    layers = [layer for layer in covered if not recipe.excludes(layer.tensor)]
    result = layers
    if recipe.slices:
        result = layers_of_result(walked[ALLOCATE.name].given(results))
    measured = [entry for node in walked.of(MEASURE) for entry in results[node.name]]
    return _Allocated(layers, result, parameters, measured, results[ALLOCATE.name], len(passes))


def _print_densities(found: _Allocated) -> None:
    from lewis.reports import tables

    for ref, each in found.allocated.experts().items():
        print(tables.allocation_text(ref, found.result, each, found.parameters), end="\n\n")


def _json_file(options: argparse.Namespace) -> Path:
    """Return the absolute path of a JSON output file; InputError, before the long work, if it cannot be written."""
    path: Path = options.output
    above = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if os.path.isdir(path) or not above.is_dir() or path.suffix == ".png":
        raise InputError(f"-o {path}: expected the name of a JSON file in a folder")
    return arguments.output_file(options, path)
