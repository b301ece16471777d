"""Walk a graph in this process: for notebooks, the command line, and the trials of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lewis.evaluation.harness import lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.harness.task_metrics import check_names
from lewis.models.compatible import preflight
from lewis.models.source import Source, pin_all
from lewis.progress import Report, silent
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import Graph, resolved


def begin(recipe: Recipe) -> dict[str, Any]:
    """Pin base and experts, and check that their headers fit together: the work before the first step of the graph.

    Returns:
        The results that the graph starts from: `resolve REF` -> `Source`.

    Raises:
        InputError: naming what does not exist or does not fit, before anything is downloaded.
        TransientError: if the Hub cannot be asked right now; trying again can help.
    """
    base, experts = pin_all(recipe)
    preflight(recipe, base, experts, network=recipe.runs_models)
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
    lm_eval.check_tasks(settings)
    check_names(recipe.evaluate, recipe.root, recipe.gate, recipe.search.metrics if recipe.search else ())
    return settings


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
    for node in graph.towards(*names, known=results):
        done = node.when is None or node.when(results)
        results[node.name] = node.step.make(node.given(results), report, device) if done else None
    return results
