"""The factory of Prefect tasks: make the task of a graph's node from its step, a row of `lewis.steps.table`."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from prefect import Task, task
from prefect.assets import Asset, materialize
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.states import Completed

from lewis import store
from lewis.errors import LewisError
from lewis.steps.graph import Node
from lewis.steps.step import Step
from lewis.steps.table import DIAGNOSE
from lewis_tasks.models import show_inspection
from lewis_tasks.support import assets
from lewis_tasks.support.caching import RESULTS, RETRIES, Progress, RecordSerializer
from lewis_tasks.support.device_slot import device_slot

SHOWN: Mapping[str, Any] = {DIAGNOSE.name: show_inspection}
"""Name of a step -> function that shows its result in the UI, given its input and the prefix of the artifact's key."""


def task_of(node: Node, asset: Callable[[str, str], Asset] = assets.asset) -> Task[..., Any]:
    """Make the Prefect task of a node, whose name, cache key, retries, timeout and assets follow from node and step.

    The task takes the step's input, the name of its run and the prefix of artifact keys. It ends as `Cached` if the
    result was found. The result that Prefect keeps is a small reference, which checks its files when it is loaded; if
    they are deleted or damaged, or the record itself is, the task runs again. Prefect keeps no result of a step in
    `SHOWN`: its task finds the result in the store, and shows it in each run.

    Args:
        asset: returns the asset of a kind and a name, with its properties.
    """
    step = node.step

    def work(given: Any, name: str, prefix: str) -> Any:
        made, found = list[Any](), step.find(given) if step.cached else None
        result = found
        if found is None:
            count = step.devices(given)
            slot = device_slot(gpus=count) if count else nullcontext("cpu")
            with slot as device, store.noticing() as made:
                result = step.make(given, Progress(f"{prefix}-{step.name}", name), device)
        if step.name in SHOWN:  # by name: in another process the step is a copy
            SHOWN[step.name](given, prefix)
        assets.describe(**step.facts(given, result))
        paths = step.paths(result)
        if found is None and (not paths or any(path in made for path in paths)):
            return result
        assets.found()
        return Completed(name="Cached", message=f"{name}: in the store", data=result)

    work.__name__ = work.__qualname__ = step.name
    options: dict[str, Any] = {"name": step.name, "task_run_name": "{name}", "timeout_seconds": step.timeout}
    options |= _kept(step) if step.cached and step.name not in SHOWN else {"cache_policy": NO_CACHE}
    options |= RETRIES if step.retries else {}
    if node.asset is None:
        return task(**options)(work)
    made_of: list[Asset | str] = [asset(*each) for each in node.made_of]
    return materialize(asset(*node.asset), by="lewis", asset_deps=made_of, **options)(work)


def _kept(step: Step[Any, Any]) -> dict[str, Any]:
    """Return task options by which Prefect keeps a step's result, with `Step.key` of the input as the cache key."""

    def key(context: TaskRunContext, inputs: dict[str, Any]) -> str | None:
        try:
            found = step.key(inputs["given"])
        except LewisError:  # the task itself reports that the input is wrong
            return None
        store.mark_used(RESULTS.folder / found)
        return found

    return {
        "cache_key_fn": key,
        "persist_result": True,
        "result_storage": RESULTS.folder,
        "result_serializer": RecordSerializer(),
        "cache_result_in_memory": False,
    }
