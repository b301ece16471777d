"""Have models scored by workers of another queue or pool: a run of the deployment `evaluate` for each task."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from lewis import settings
from lewis.errors import LewisError
from lewis.evaluation import work_queue
from lewis.evaluation.statistics.scored import MERGED
from lewis.evaluation.step import ScoresEntry, find_all_scores
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import LOOK, Node
from lewis.steps.table import DOWNLOAD, EVALUATE, ScoreInput, by_task
from lewis_flows import prefect_runs, recipes_folder
from lewis_flows.walk import Walk, submit
from lewis_tasks.evaluate import take_scores

logger = logging.getLogger(__name__)
DEPLOYMENT = f"{prefect_runs.EVALUATE}/evaluate"
POLL = 2.0  # seconds
ATTEMPTS = 3  # how many runs one merge starts for a task, if each before the last has died with its worker


def queue_for(recipe: Path) -> str:
    """Return the work queue that the models of a recipe are scored in; empty if they are scored in this process.

    A recipe outside of the folder of recipes is scored here: other workers do not find it.

    Raises:
        InputError: as `lewis.evaluation.work_queue.queue`.
    """
    queue = work_queue.queue()
    if queue and not recipes_folder.holds(recipe):
        place = work_queue.place(queue)
        logger.info("%s is not in the folder of recipes: its models are scored here, not in the %s", recipe, place)
        return ""
    return queue


def score(
    walk: Walk,
    results: Mapping[str, Any],
    queue: str,
    plan: Recipe,
    name: str,
    overrides: Sequence[str],
    tasks: str,
    nodes: Sequence[Node],
) -> None:
    """Add the scores of its models to a walk: from the store, or from runs in the queue, which are waited for.

    There is a run for each task of which a score is missing, so that several workers share the work; it scores all
    models on its task, in one number format. The runs are cancelled if the wait is interrupted, as by Ctrl-C.

    Args:
        walk: with the models; it gets a task for each of its scores.
        results: as of `Walk.go`.
        queue: as `queue_for` gave it.
        plan: the recipe, whose name in the folder of recipes is `name`.
        overrides: of the merge.
        tasks: digest of the evaluation tasks.
        nodes: the evaluation nodes whose scores are wanted.

    Raises:
        LewisError: if a run did not make its scores; says how it ended.
    """
    found = dict(results)
    given: dict[str, ScoreInput] = {node.name: node.given(found) for node in nodes if walk.wants(node, found)}
    missing = [of_task for of_task in by_task(given) if _find(of_task) is None]
    if missing:
        base = walk.futures[f"{DOWNLOAD.name} {plan.base_model}"].result().key if plan.base_model else None
        common = {"recipe": name, "tasks": tasks, "base": base, "overrides": list(overrides), "look": found.get(LOOK)}
        merged = {MERGED: walk.futures["merge experts"].result().key}  # its digest may decide which documents are drawn
        models = [{each.label: each.key for each in of_task.values()} | merged for of_task in missing]
        wanted = [next(iter(of_task.values())).settings.tasks[0] for of_task in missing]
        _run(queue, [{**common, "models": of, "task": task} for of, task in zip(models, wanted, strict=True)])
    entries = _find(given)
    if entries is None:
        raise LewisError(
            f"evaluate: the runs in the {work_queue.place(queue)} have scored the models, but the store here does not "
            "have the scores; the workers must share its disk (LEWIS_HOME), or all must have the same LEWIS_STORE"
        )
    what = {node: node.removeprefix(f"{EVALUATE.name} ") for node in given}
    walk.futures |= {node: submit(take_scores, entries[node], what[node], not missing) for node in given}


def run_name(recipe: str, task: str | None) -> str:
    """Return the name of a run that evaluates a recipe on one task, or on all."""
    return f"evaluate {recipe}: {Path(task).stem}" if task else f"evaluate {recipe}"


def _find(given: Mapping[str, ScoreInput]) -> dict[str, ScoresEntry] | None:
    """Find the scores of all nodes in the store, those of a task in one number format; None if some are missing."""
    entries = dict[str, ScoresEntry]()
    for of_task in by_task(given):
        models = {node: (each.ref, each.key) for node, each in of_task.items()}
        found = find_all_scores(models, next(iter(of_task.values())).settings)
        if found is None:
            return None
        entries |= found
    return entries


def _run(queue: str, parameters: Sequence[dict[str, Any]]) -> None:
    """Start a run in the queue for each of `parameters`, and wait until all have ended well; replace one that dies.

    What the dead run had scored is in the store, where the next one finds it.
    """
    place, runs = work_queue.place(queue), list[FlowRun]()
    with get_client(sync_client=True) as client:
        try:
            for each in parameters:
                runs.append(_start(client, queue, each))
            for number, each in enumerate(parameters):
                for attempt in range(ATTEMPTS):
                    runs[number] = run = _wait(client, runs[number], queue)
                    state = run.state
                    if not (state and state.is_crashed()) or attempt == ATTEMPTS - 1:
                        break
                    logger.warning("the run %s in the %s died; starting it again: %s", run.name, place, state.message)
                    runs[number] = _start(client, queue, each)
                assert state is not None
                if not state.is_completed():
                    died = "was cancelled" if state.is_cancelled() else f"died {ATTEMPTS} times"
                    raise LewisError(
                        f"evaluate: the run {run.name} in the {place} {'failed' if state.is_failed() else died}: "
                        f"{state.message or state.name}; what was scored is kept, run the merge again to go on"
                    )
        except BaseException:  # also the exception of a cancelled run
            for run in runs:
                if not (run.state and run.state.is_final()):
                    with suppress(Exception):
                        client.set_flow_run_state(run.id, Cancelling(message="The merge that waited for it has ended."))
            raise


def _start(client: SyncPrefectClient, queue: str, parameters: dict[str, Any]) -> FlowRun:
    place = work_queue.place(queue)
    try:
        if (found := client.read_deployment_by_name(DEPLOYMENT).work_pool_name) != work_queue.pool():
            raise LewisError(
                f"evaluate: expected the deployment {DEPLOYMENT} in the work pool {work_queue.pool()}, but it is in "
                f"{found}; run `lewis deploy` with the LEWIS_EVALUATE_POOL that the merges have"
            )
        name = run_name(parameters["recipe"], parameters["task"])
        run = run_deployment(DEPLOYMENT, parameters=parameters, flow_run_name=name, timeout=0, work_queue_name=queue)
    except ObjectNotFound as error:
        raise LewisError(
            f"evaluate: the Prefect server has no deployment {DEPLOYMENT}, which LEWIS_EVALUATE_QUEUE and "
            f"LEWIS_EVALUATE_POOL need; run `lewis deploy`, and if you deploy a file of your own, copy it from "
            "deployments/prefect.yaml"
        ) from error
    except httpx.HTTPError as error:
        raise LewisError(f"evaluate: the Prefect server takes no run for the {place}: {error}") from error
    assert isinstance(run, FlowRun)  # not awaitable, as there is no event loop here
    logger.info("%s of %s is scored by the run %s in the %s", parameters["task"], parameters["recipe"], run.name, place)
    return run


def _wait(client: SyncPrefectClient, run: FlowRun, queue: str) -> FlowRun:
    late, away, answered = False, False, time.monotonic()
    while True:
        try:
            run, away, answered = client.read_flow_run(run.id), False, time.monotonic()
        except ObjectNotFound:
            raise LewisError(f"evaluate: the run {run.name} in the {work_queue.place(queue)} was deleted") from None
        except httpx.HTTPError as error:  # as in every run, the client itself has waited for a server that is away
            if time.monotonic() - answered >= settings.SERVER_WAIT.get():
                raise LewisError(
                    f"evaluate: Prefect does not say how the run {run.name} in the {work_queue.place(queue)} goes on: "
                    f"{error}; what was scored is kept, run the merge again to go on"
                ) from error
            if not away:
                logger.warning("Prefect does not say how the evaluation goes on; asking again: %s", error)
            away = True
        if run.state and run.state.is_final():
            return run
        if run.state and run.state.name == "Late" and not late:
            options = work_queue.worker_options(queue, work_queue.pool())
            logger.warning(
                "no worker takes the evaluation run %s: is one started with `%s`, and has it time?", run.name, options
            )
            late = True
        time.sleep(POLL)
