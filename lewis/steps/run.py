"""Walk a graph in this process: for notebooks, the command line, and the trials of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lewis.evaluation.harness import check
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.model_folder import check_code, check_tokenizer
from lewis.evaluation.statistics.scored import MERGED
from lewis.models.compatible import preflight
from lewis.models.hub import repository
from lewis.models.source import Source, pin_all
from lewis.progress import Report, silent
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import Graph, labels, resolved
from lewis.steps.table import CHECK, DOWNLOAD, MERGE


def begin(recipe: Recipe) -> dict[str, Any]:
    """Pin base and experts, and check that their headers fit together: the work before the first step of the graph.

    Returns:
        The results that the graph starts from: `resolve REF` -> `Source`.

    Raises:
        InputError: naming what does not exist or does not fit, before anything is downloaded.
        TransientError: if the Hub cannot be asked right now; trying again can help.
    """
    base, experts = pin_all(recipe)
    preflight(recipe, base, experts, needed=recipe.runs_models)
    return pinned(base, experts)


def check_tasks(recipe: Recipe) -> EvalSettings | None:
    """Check that the tasks of a recipe's evaluation exist and give the scores that it names, before any work.

    Returns:
        What is scored, and how; None if the recipe scores nothing.

    Raises:
        InputError: naming the task or the score.
    """
    if recipe.evaluate is None:
        return None
    settings = EvalSettings.of(recipe.evaluate, recipe.root)
    check.check_tasks(settings)
    check.check_names(recipe.evaluate, recipe.root, recipe.gate, recipe.search.metrics if recipe.search else ())
    return settings


def check_scored(recipe: Recipe, base: Source | None, experts: Sequence[Source]) -> None:
    """Check that every model that a recipe scores has the tokenizer that this needs; only configs are downloaded.

    Args:
        recipe: whose models were pinned.
        base: the base, if it has one.
        experts: in the recipe's order.

    Raises:
        InputError: as `check_tokenizer`.
        TransientError: if the Hub cannot be asked right now; trying again can help.
    """
    if recipe.evaluate is None:
        return
    settings, scored = EvalSettings.of(recipe.evaluate, recipe.root), set(labels(recipe).values())
    sources = {source.ref: source for source in [*([base] if base else []), *experts]}
    folders = {
        ref: [repository.fetch(each, weights=False) for each in (source.model, *source.adapters)]
        for ref, source in sources.items()
    }
    for ref, places in folders.items():
        if f"{DOWNLOAD.name} {ref}" in scored:
            check_tokenizer(ref, places, settings)
    donor = recipe.vocabulary.source if recipe.vocabulary else ""
    of_merged = folders.get(donor, next(iter(folders.values())))
    if recipe.chat_template is not None:  # the result's own
        settings = replace(settings, apply_chat_template=False)
    if recipe.evaluate.runs_model_code and recipe.output.kind == "full":
        check_code(MERGED, next(iter(folders.values()))[0], copied=False)
    check_tokenizer(MERGED, of_merged, settings)


def pinned(base: Source | None, experts: list[Source]) -> dict[str, Any]:
    """Return pinned models as the results that a graph starts from: `resolve REF` -> `Source`."""
    return {resolved(source.ref): source for source in [*([base] if base else []), *experts]}


def run(
    graph: Graph, *names: str, known: Mapping[str, Any], report: Report = silent, device: str = "cpu"
) -> dict[str, Any]:
    """Do the named steps, and all that they need, one after another.

    Args:
        graph: of a recipe.
        names: of nodes.
        known: results that exist already: those of `begin`, and of nodes that were done before.
        report: called by the steps with (what, done, total).
        device: of forward passes.

    Returns:
        `known`, and the result of every node that was done; None for one whose condition did not hold.

    Raises:
        LewisError: the error of the step that fails.
    """
    results = dict(known)
    walked = graph.towards(*names, known=results)
    for node in walked:
        if node.when is not None and not node.when(results):
            results[node.name] = None
            continue
        given = node.given(results)
        if node.step is CHECK and not walked.of(MERGE):
            given = replace(given, copies=0)  # no merged model is written, so none needs room
        results[node.name] = node.step.make(given, report, device)
    return results
