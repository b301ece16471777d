"""Walk the graph of a recipe with Prefect: a task for each node, as soon as what it needs is there."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from prefect import Task
from prefect.futures import PrefectFuture, wait
from prefect.utilities.annotations import quote

from lewis.models.source import Source
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import PREFLIGHT, Graph, Node, resolved
from lewis_tasks.inspect import preflight
from lewis_tasks.resolve import resolve
from lewis_tasks.steps import task_of
from lewis_tasks.support.failures import result_of

R = TypeVar("R")
Futures = dict[str, PrefectFuture[Any]]
"""Name of a node, or of a task by hand -> its future."""

# Whoever waits in the flow for what a task needs, and gives it quoted, draws no edge in Prefect's UI. So the graph of a
# run has only the edges of `Graph.edges`, and reads from left to right.


def walk(graph: Graph, begun: Futures, prefix: str, results: Mapping[str, Any] | None = None) -> Futures:
    """Submit the tasks of a graph in its order, each when the results that it needs are there.

    Args:
        graph: of a recipe, or a part of it.
        begun: the tasks by hand, and those of nodes that were submitted before.
        prefix: of the keys of artifacts.
        results: what is taken for the result of a name, instead of what its task returned.

    Returns:
        The futures of this graph's nodes, and those of `begun`. The last ones may not have ended.

    Raises:
        LewisError: what the first failed task raised that a node needs.
    """
    futures, found = dict(begun), dict(results or {})
    for node in graph:
        if wanted(node, futures, found):
            after = [futures[name] for name in graph.edges(node.name) if name in futures]
            futures[node.name] = submit(task_of(node), quote(node.given(found)), node.name, prefix, wait_for=after)
    return futures


def wanted(node: Node, futures: Futures, found: dict[str, Any]) -> bool:
    """Wait for what a node needs, and put it into `found`; gives whether the node is to be done.

    Raises:
        LewisError: what the first failed task raised that the node needs.
    """
    needed = {name: futures[name] for name in node.needs if name in futures}
    finish(*needed.values())
    found |= {name: future.result() for name, future in needed.items() if name not in found}
    return node.when is None or node.when(found)


def pin(plan: Recipe, checks: Iterable[PrefectFuture[Any] | None]) -> Futures:
    """Resolve base and experts, and check from their headers that they fit together.

    Args:
        plan: the recipe.
        checks: nothing is looked at before they have ended: if a task does not exist, the run fails early.

    Raises:
        LewisError: if a check fails, or a model does not exist or does not fit.
    """
    base = submit(resolve, quote(plan), plan.base_model) if plan.base_model else None
    finish(base)
    experts = list[PrefectFuture[Source]]()
    for entry in plan.experts:  # without a base, models are read under the names of the first
        first = experts[0] if experts and base is None else None
        experts.append(submit(resolve, quote(plan), entry.model, known(base), first))
    checked = submit(preflight, quote(plan), base, experts, wait_for=[each for each in checks if each])
    finish(*checks, *experts, checked)
    found = {resolved(entry.model): future for entry, future in zip(plan.experts, experts, strict=True)}
    return {**({resolved(plan.base_model): base} if plan.base_model and base else {}), **found, PREFLIGHT: checked}


def submit(
    task: Task[..., R], *arguments: Any, wait_for: Iterable[PrefectFuture[Any]] | None = None
) -> PrefectFuture[R]:
    """Start a task as soon as its arguments are there.

    It is `Task.submit`, whose own types allow only an argument's value.

    Args:
        task: what to start.
        arguments: for each argument its value, a future of it, or the value quoted; Prefect searches a value for
            results of other tasks, but not a quoted one.
        wait_for: what must have ended before.
    """
    return task.submit(*arguments, wait_for=wait_for, return_state=False)


def known(futures: Any) -> quote:
    """The results of finished tasks, quoted, so that Prefect draws no edges from those tasks to their reader.

    For readers that only write down what is known. Their edges would say nothing, and they are many: Prefect's server
    sends each edge as many times as the task it comes from has inputs, and its UI draws no edge at all if it counts
    more than 500.

    Args:
        futures: a future, None, or a list or dictionary of futures.
    """
    if isinstance(futures, dict):
        return quote({name: future.result() for name, future in futures.items()})
    if isinstance(futures, list):
        return quote([future.result() for future in futures])
    return quote(futures.result() if futures else None)


def finish(*futures: PrefectFuture[Any] | None) -> None:
    """Wait for all tasks.

    Raises:
        LewisError: what the first failed task in this order raised; so give a cause before what it breaks.
    """
    given = [future for future in futures if future is not None]
    wait(given)
    for future in given:
        result_of(future)
