"""Walk the graph of a recipe with Prefect: a task for each node, as soon as what it needs is there."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from prefect import Task
from prefect.assets import Asset
from prefect.futures import PrefectFuture, wait
from prefect.utilities.annotations import quote

from lewis.errors import LewisError
from lewis.evaluation.step import ModelScores
from lewis.models.source import Source
from lewis.recipe.recipe import Recipe
from lewis.registry import versions
from lewis.steps.graph import PREFLIGHT, Node, evaluations, graph, resolved, short_refs
from lewis.steps.step import Step
from lewis.steps.table import ALLOCATE, CALIBRATE, CONTINUE, DIAGNOSE, DOWNLOAD
from lewis_tasks.models import preflight, resolve, resolve_at
from lewis_tasks.steps import task_of
from lewis_tasks.support.assets import artifact_prefix, asset, page_of
from lewis_tasks.support.failures import result_of

R = TypeVar("R")
Futures = dict[str, PrefectFuture[Any]]  # name of a node, or of a task by hand -> its future
Scores = dict[str, list[PrefectFuture[Any]]]  # label of a model -> futures of its scores, one for each task

# A flow that waits for what a task needs, and passes it quoted, draws no edge in Prefect's UI. So the graph of a
# run has only the edges of `Graph.edges`, and reads from left to right. And no task is submitted before all that it
# waits for has ended well: else it would stay `NotReady` in Prefect, drawn as a bar that grows.


class Walk:
    """The execution of a recipe's graph by Prefect tasks.

    Attributes:
        graph: of a recipe.
        futures: of the tasks outside of the graph that it begins with, and of the nodes that were submitted.
    """

    def __init__(self, plan: Recipe, begun: Futures) -> None:
        """Begin the walk of a recipe; `begun` is the result of `pin` for it."""
        self.graph, self.futures, self._prefix = graph(plan), dict(begun), artifact_prefix(plan)
        self._before = list[tuple[Node, PrefectFuture[Any]]]()
        self._registered, self._evaluations = plan.register_as, evaluations(plan)

    def go(self, nodes: Iterable[Node], results: Mapping[str, Any] | None = None, note: str = "") -> None:
        """Submit the tasks of nodes in order, each once the results that it needs are there.

        Args:
            results: name -> result to use instead of the one that the name's task returned.
            note: suffix of the names of the tasks.

        Raises:
            LewisError: the error of `diagnose` if that failed, since it says what is wrong with a model; else of the
                first failed task that a node needs.
        """
        found = dict(results or {})
        try:
            for node in nodes:
                if not self.wants(node, found):
                    continue
                if node.name in self.futures:  # from an earlier walk with other results
                    self._before.append((node, self.futures[node.name]))
                after = [self.futures[name] for name in self.graph.edges(node.name) if name in self.futures]
                finish(*after)
                given = quote(node.given(found)), node.label + note, self._prefix
                self.futures[node.name] = submit(task_of(node, self._asset), *given, wait_for=after)
        except LewisError:
            finish(*self.of(DIAGNOSE))
            raise

    def _asset(self, kind: str, name: str) -> Asset:
        """An asset with the team that it belongs to, and its page on the Hub or in MLflow."""
        pinned, team, url = self.futures.get(resolved(name)), "", ""
        if self._registered:
            team, model = self._registered.team, self._registered.model
            url = versions.model_page(model) if (kind, name) == ("merged", model) else ""
        return asset(kind, name, page_of(pinned.result()) if pinned else url, team)

    def wants(self, node: Node, found: dict[str, Any]) -> bool:
        """Wait for the results that a node needs and add them to `found`; returns whether the node is to be done.

        Raises:
            LewisError: the error of the first failed task that the node needs.
        """
        needed = {name: self.futures[name] for name in node.needs if name in self.futures}
        finish(*needed.values())
        found |= {name: future.result() for name, future in needed.items() if name not in found}
        return node.when is None or node.when(found)

    def of(self, *steps: Step[Any, Any]) -> list[PrefectFuture[Any]]:
        """Return the futures of the nodes of some steps, in graph order, after earlier ones of nodes done again."""
        now = [self.futures[each.name] for each in self.graph if each.step in steps and each.name in self.futures]
        return [future for node, future in self._before if node.step in steps] + now

    def scores(self) -> Scores:
        """Label of a model -> futures of its scores on each task, in the order of the table."""
        return {
            label: [self.futures[name] for name in names]
            for label, names in self._evaluations.items()
            if names and names[0] in self.futures
        }

    def inputs(self, plan: Recipe) -> list[quote]:
        """Return base, experts, calibration sets and densities, quoted, for tasks that record them."""
        base = self.futures[f"{DOWNLOAD.name} {plan.base_model}"] if plan.base_model else None
        experts = [self.futures[f"{DOWNLOAD.name} {entry.model}"] for entry in plan.experts]
        return [known(each) for each in (base, experts, self.of(CALIBRATE, CONTINUE), self.futures.get(ALLOCATE.name))]


def pin(plan: Recipe, checks: Iterable[PrefectFuture[Any] | None], keys: Mapping[str, str] | None = None) -> Futures:
    """Resolve base and experts, and check from their headers that they fit together.

    Args:
        checks: must have ended well before headers are read: if an evaluation task does not exist, the run fails early.
        keys: reference of each model -> the commits that it is pinned to; None: to its current ones.

    Raises:
        LewisError: if a check fails, or a model does not exist or does not fit.
    """
    short = short_refs(plan)

    def resolved_to(ref: str, *about: Any) -> PrefectFuture[Source]:
        if keys is None:
            return submit(resolve, quote(plan), ref, short[ref], *about)
        return submit(resolve_at, quote(plan), ref, short[ref], keys[ref], *about)

    base = resolved_to(plan.base_model) if plan.base_model else None
    finish(base)
    experts = list[PrefectFuture[Source]]()
    for entry in plan.experts:  # without a base, models are read under the names of the first
        first = experts[0] if experts and base is None else None
        finish(first)
        experts.append(resolved_to(entry.model, known(base), first))
    finish(*checks, *experts)
    checked = submit(preflight, quote(plan), base, experts, wait_for=[each for each in checks if each])
    finish(checked)
    found = {resolved(entry.model): future for entry, future in zip(plan.experts, experts, strict=True)}
    return {**({resolved(plan.base_model): base} if plan.base_model and base else {}), **found, PREFLIGHT: checked}


def submit(
    task: Task[..., R], *arguments: Any, wait_for: Iterable[PrefectFuture[Any]] | None = None
) -> PrefectFuture[R]:
    """Start a task as soon as its arguments are there. Tasks among them that can fail must have been finished before.

    It is `Task.submit`, whose own types do not allow the future of an argument.

    Args:
        arguments: for each argument its value, a future of it, or the value quoted; Prefect searches a value for
            results of other tasks, but not a quoted one.
        wait_for: what must have ended before.
    """
    return task.submit(*arguments, wait_for=wait_for, return_state=False)


def known(futures: Any) -> quote:
    """The results of finished tasks, quoted, so that Prefect draws no edges from those tasks to their reader.

    It is for readers that only record results. Their many edges would say nothing, and Prefect's server sends each edge
    as many times as the task it comes from has inputs, while its UI draws no edge at all if it counts more than 500.

    Args:
        futures: a future, None, or a list of futures.
    """
    if isinstance(futures, list):
        return quote([future.result() for future in futures])
    return quote(futures.result() if futures else None)


def known_scores(scores: Scores) -> quote:
    """Return label of a model -> `ModelScores`, from finished tasks, quoted as by `known`."""
    return quote(
        {label: ModelScores(entries=tuple(each.result() for each in of_model)) for label, of_model in scores.items()}
    )


def finish(*futures: PrefectFuture[Any] | None) -> None:
    """Wait until all tasks have ended.

    Raises:
        LewisError: the error of the first failed task in this order; so pass a cause before the tasks that it breaks.
    """
    given = [future for future in futures if future is not None]
    wait(given)
    for future in given:
        result_of(future)
